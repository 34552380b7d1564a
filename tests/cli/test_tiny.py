"""The real program with the built-in model: the command and the Python API are one."""

import json
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image, ImageDraw
from support.processes import PATIENCE, imported_by, run_process

TINY = ("--model-path", "tiny", "--devices", "cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A red disc on white, 150 px wide and 90 px high: 10 columns of 6 patches."""
    image = Image.new("RGB", (150, 90), "white")
    ImageDraw.Draw(image).ellipse((50, 20, 100, 70), fill="red")
    file = tmp_path_factory.mktemp("picture") / "disc.png"
    image.save(file)
    return str(file)


@pytest.fixture(scope="module")
def model():
    import torch

    from pixtral_cli import Pixtral

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that it is compared with
    yield Pixtral.load("tiny", devices="cpu")
    torch.set_num_threads(threads)


def test_run_gives_the_same_tokens_as_the_python_api(program, model, picture):
    options = ["--max-new-tokens", "6", "--ignore-eos", "--quantization-encoding", "bfloat16"]
    done = program("run", *TINY, "-i", picture, "-p", "What shape is it?", "--json", *options)
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What shape is it?"}]
    reply = model.chat([{"role": "user", "content": content}], max_new_tokens=6, ignore_eos=True)
    shown = json.loads(done.stdout)
    assert done.stderr == b"" and shown["token_ids"] == list(reply.token_ids) and shown["text"] == reply.text
    assert shown["prompt_token_ids"] == list(reply.prompt_token_ids)
    usage = {"prompt_tokens": len(reply.prompt_token_ids), "completion_tokens": 6, "image_tokens": 66}
    assert usage.items() <= shown["usage"].items()
    assert shown["finish_reason"] == "length"


@pytest.mark.parametrize("raw", [False, True])
def test_tokenize_shows_the_ids_that_the_model_gets(program, model, picture, raw):
    flags = ["-i", picture, "-p", "A [IMG] typed" if not raw else "The above image presents a"] + ["--raw"] * raw
    shown = json.loads(program("tokenize", "--model-path", "tiny", *flags, "--json").stdout)
    if raw:
        wanted = model.complete(flags[3], images=[picture], max_new_tokens=1).prompt_token_ids
    else:
        content = [{"type": "image", "url": picture}, {"type": "text", "text": flags[3]}]
        wanted = model.chat([{"role": "user", "content": content}], max_new_tokens=1).prompt_token_ids
    assert shown["token_ids"] == list(wanted) and shown["tokens"] == len(wanted)
    assert shown["images"] == [
        {
            "original_width": 150,
            "original_height": 90,
            "width": 160,
            "height": 96,
            "scaled_down": False,
            "rows": 6,
            "columns": 10,
            "tokens": 66,
        }
    ]


def test_a_photograph_is_turned_upright_once(program, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=exif)
    part = {"type": "image", "path": str(tmp_path / "turned.jpg")}
    (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": [part]}]))
    for request in (["-p", "hi", "-i", part["path"]], ["--messages", str(tmp_path / "m.json")]):
        (shown,) = json.loads(program("tokenize", "--model-path", "tiny", *request, "--json").stdout)["images"]
        assert (shown["width"], shown["height"]) == (32, 64)


def test_messages_may_ask_for_a_picture_in_low_detail(program, tmp_path):
    Image.new("RGB", (1024, 64)).save(tmp_path / "wide.png")
    part = {"type": "image_url", "image_url": {"url": str(tmp_path / "wide.png"), "detail": "low"}}
    (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": [part]}]))
    shown = program("tokenize", "--model-path", "tiny", "--messages", str(tmp_path / "m.json"), "--json").stdout
    (image,) = json.loads(shown)["images"]
    assert (image["original_width"], image["width"], image["height"], image["tokens"]) == (1024, 512, 32, 2 * 33)


def test_tokenize_says_the_same_in_words(program, picture):
    lines = program("tokenize", "--model-path", "tiny", "-i", picture, "-p", "hi").stdout.decode().splitlines()
    ids = lines[0].split()
    assert ids[:3] == ["1", "3", "10"] and ids[-1] == "4" and lines[2] == f"{len(ids)} tokens"
    assert lines[1] == "picture 1: 150x90 px, resized to 160x96 px, 6 rows of 10 tokens, 66 with row ends"


def test_that_a_picture_is_scaled_down_is_said_in_a_line_with_both_sizes_and_its_tokens(program, picture, tmp_path):
    Image.new("RGB", (2100, 50)).save(tmp_path / "wide.png")
    images = ["-i", picture, "-i", str(tmp_path / "wide.png")]
    done = program("run", *TINY, *images, "-p", "hi", "--max-new-tokens", "2")
    assert done.stderr == b"pixtral: picture 2 is scaled down from 2100x50 to 1024x32 px: 130 tokens.\n"
    assert program("run", *TINY, *images, "-p", "hi", "--max-new-tokens", "2", "--quiet").stderr == b""
    shown = program("tokenize", "--model-path", "tiny", *images, "-p", "hi")
    assert b"picture 2: 2100x50 px, scaled down to 1024x32 px, 2 rows of 64 tokens, 130 with row ends" in shown.stdout
    again = json.loads(program("tokenize", "--model-path", "tiny", *images, "-p", "hi", "--json").stdout)
    assert [image["scaled_down"] for image in again["images"]] == [False, True]


def test_tokenize_imports_neither_torch_nor_a_downloader(picture):
    heavy = imported_by("tokenize", "--model-path", "tiny", "-i", picture, "-p", "hi")
    assert not {"torch", "transformers", "huggingface_hub", "rich"} & set(heavy)


def test_run_imports_no_compiler_and_nothing_that_only_other_jobs_need(picture):
    heavy = imported_by("run", *TINY, "-i", picture, "-p", "hi", "--max-new-tokens", "1")
    assert "torch" in heavy
    assert not {"torch._dynamo", "transformers", "bitsandbytes", "huggingface_hub", "rich"} & set(heavy)


def test_the_built_in_model_needs_no_network(picture):
    program = (
        "import socket, sys\n"
        "def refuse(*arguments, **keywords):\n    raise AssertionError('the network was tried')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        f"sys.argv = {['pixtral', 'run', *TINY, '-i', picture, '-p', 'hi', '--max-new-tokens', '2']!r}\n"
        "from pixtral_cli.__main__ import main\nmain()\n"
    )
    done = run_process([sys.executable, "-c", program])
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_prompt_longer_than_the_context_tells_both_numbers(program, picture):
    done = program("run", *TINY, "-i", picture, "-p", "hi", "--max-length", "40")
    counted = program("tokenize", "--model-path", "tiny", "-i", picture, "-p", "hi", "--json")
    tokens = json.loads(counted.stdout)["tokens"]
    error = done.stderr.decode()
    assert done.returncode == 1 and "40" in error and str(tokens) in error and len(error.splitlines()) == 2


def test_an_interrupt_in_the_middle_of_an_answer_leaves_with_130(start_program):
    flags = ["-p", "hello", "--ignore-eos", "--temperature", "1", "--seed", "1"]
    process = start_program("run", *TINY, *flags, stdin=subprocess.DEVNULL)
    assert process.stdout.read1(1)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and error == b"" and rest.endswith(b"\n")
