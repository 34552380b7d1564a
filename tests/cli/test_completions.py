"""`pixtral completions`: the scripts are what the program prints, and each shell that is here completes with them."""

import json
from pathlib import Path

import pytest
from support.hub_cache import HF, put, weights
from support.processes import imported_by
from support.shells import Shell, installed

from pixtral_cli import encoding_choices
from pixtral_cli.cli import completions
from pixtral_cli.cli.completions import program

ROOT = Path(__file__).resolve().parents[2]
FILES = {"bash": "pixtral.bash", "zsh": "_pixtral", "fish": "pixtral.fish"}
HERE = ("my picture.png", "my notes.txt", "weights of mine.safetensors", "chat.json", "chat.txt", "out.q4", "it's.png")
BASH_COMPLETION = "/usr/share/bash-completion/bash_completion"
SETUPS = {
    "bash": "source <(pixtral completions bash)",
    "zsh": "autoload -Uz compinit && compinit -u; source <(pixtral completions zsh)",
    "fish": "pixtral completions fish | source",
}
OTHER_SETUPS = {
    "bash, breaks left out": "COMP_WORDBREAKS=${COMP_WORDBREAKS//[=:]/}; " + SETUPS["bash"],
    "bash, with its package": f"source {BASH_COMPLETION}; " + SETUPS["bash"],
    "zsh, no compinit": "source <(pixtral completions zsh)",
    "zsh, fpath": f"fpath=({ROOT / 'completions'} $fpath); autoload -Uz compinit && compinit -u",
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Open a shell that has read a setup, in a folder with the files HERE; two models are in the Hub's cache."""
    shells = []

    def start(name: str, setup: str) -> Shell:
        if not installed(name):
            pytest.skip(f"{name} is not installed")
        home = tmp_path_factory.mktemp("home")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIXTRAL_CACHE", str(home / "own"))
            put(home / "hub", "acme/pixie", {"model-Q4_K_M.gguf": b"GGUF"})
            put(home / "hub", "mistral-community/other", HF | {"model.safetensors": weights()}, ref="v2")
        (home / "here" / "folder").mkdir(parents=True)
        for file in HERE:
            (home / "here" / file).write_text("")
        shells.append(Shell(name, home, setup, HF_HUB_CACHE=str(home / "hub"), PIXTRAL_CACHE=str(home / "own")))
        return shells[-1]

    yield start
    for shell in shells:
        shell.close()


@pytest.fixture(scope="module", params=SETUPS)
def shell(request, opened):
    return opened(request.param, SETUPS[request.param])


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_what_the_program_prints(program, name):
    done = program("completions", name)
    assert done.returncode == 0 and done.stdout == (ROOT / "completions" / FILES[name]).read_bytes()


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("pixtral tok", ["tokenize"]),
        ("pixtral cache rem", ["cache", "remove"]),
        ("pixtral run --max-new", ["run", "--max-new-tokens"]),
        ("pixtral run -p 'a b' --raw --max-new", ["run", "-p", "a b", "--raw", "--max-new-tokens"]),
        ("pixtral cache list --js", ["cache", "list", "--json"]),
        ("pixtral serve --quantization-encoding bf", ["serve", "--quantization-encoding", "bfloat16"]),
        ("pixtral run --quantization-encoding=bf", ["run", "--quantization-encoding=bfloat16"]),
        ("pixtral run --devices c", ["run", "--devices", "cpu"]),
    ],
)
def test_commands_flags_and_choices(shell, line, arguments):
    assert shell.arguments(line) == arguments


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("pixtral run --model-path ti", ["run", "--model-path", "tiny"]),
        ("pixtral run --model-path=ti", ["run", "--model-path=tiny"]),
        ("pixtral run --model-path acm", ["run", "--model-path", "acme/pixie:model-Q4_K_M.gguf"]),
        ("pixtral serve --model-path=acm", ["serve", "--model-path=acme/pixie:model-Q4_K_M.gguf"]),
        ("pixtral inspect acme/pixie:mod", ["inspect", "acme/pixie:model-Q4_K_M.gguf"]),
        ("pixtral download mistral-community/oth", ["download", "mistral-community/other@v2"]),
        ("pixtral cache remove mistral-community/other@", ["cache", "remove", "mistral-community/other@v2"]),
        ("pixtral cache remove --yes tiny acme", ["cache", "remove", "--yes", "tiny", "acme/pixie:model-Q4_K_M.gguf"]),
        ("pixtral export acme", ["export", "acme/pixie:model-Q4_K_M.gguf"]),
    ],
)
def test_models_of_the_cache(shell, line, arguments):
    assert shell.arguments(line) == arguments


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("pixtral run -i it", ["run", "-i", "it's.png"]),
        ("pixtral run --image=my\\ pi", ["run", "--image=my picture.png"]),
        ("pixtral run -i 'my pi", ["run", "-i", "my picture.png"]),
        ("pixtral run -i ~/here/my\\ pi", ["run", "-i", "{home}/here/my picture.png"]),
        ("pixtral run --weight-path we", ["run", "--weight-path", "weights of mine.safetensors"]),
        ("pixtral export tiny ou", ["export", "tiny", "out.q4"]),
        ("pixtral verify ou", ["verify", "out.q4"]),
    ],
)
def test_files_whatever_is_in_their_names(shell, line, arguments):
    assert shell.arguments(line) == [word.replace("{home}", str(shell.home)) for word in arguments]


@pytest.mark.parametrize("setup", OTHER_SETUPS)
def test_it_completes_however_the_script_is_read(opened, setup):
    if BASH_COMPLETION in OTHER_SETUPS[setup] and not Path(BASH_COMPLETION).is_file():
        pytest.skip("bash-completion is not installed")
    shell = opened(setup.partition(",")[0], OTHER_SETUPS[setup])
    assert shell.arguments("pixtral cache rem") == ["cache", "remove"]
    assert shell.arguments("pixtral run --quantization-encoding=bf") == ["run", "--quantization-encoding=bfloat16"]
    assert shell.arguments("pixtral run --model-path=acm") == ["run", "--model-path=acme/pixie:model-Q4_K_M.gguf"]
    assert shell.arguments("pixtral inspect acme/pixie:mod") == ["inspect", "acme/pixie:model-Q4_K_M.gguf"]
    assert shell.arguments("pixtral cache remove mistral-community/other@")[-1] == "mistral-community/other@v2"
    assert shell.arguments("pixtral run --image=my\\ pi") == ["run", "--image=my picture.png"]


def test_a_folder_is_offered_where_one_is_wanted(shell):
    *flags, folder = shell.arguments("pixtral serve --media-path f")
    assert (flags, folder.rstrip("/")) == (["serve", "--media-path"], "folder")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("pixtral ", ("run", "serve", "cache", "completions")),
        ("pixtral cache ", ("list", "prune", "remove")),
        ("pixtral run --quantiz", ("--quantization-encoding", "--quantize-vision")),
        ("pixtral inspect ", ("tiny", "pixtral-12b", "pixie", "other", "out.q4", "folder/")),
        ("pixtral run --quantization-encoding ", encoding_choices.CHOICES),
        ("pixtral run --devices ", ("cpu", "gpu")),
    ],
)
def test_what_fits_is_listed(shell, line, wanted):
    shell.offers(line, *wanted)


def test_flags_and_commands_are_described_where_the_shell_can(shell):
    if shell.name == "bash":
        pytest.skip("bash shows no descriptions")
    shell.offers("pixtral run --quantiz", "How the weights are stored", "Pack the picture part too")
    shell.offers("pixtral cache ", "Remove models by name")


@pytest.mark.parametrize("name", completions.LISTINGS)
def test_what_the_scripts_ask_imports_nothing_heavy(name, caches):
    put(caches, "acme/pixie", HF | {"model.safetensors": weights()})
    assert imported_by("completions", name, HF_HUB_CACHE=str(caches)) == []


def test_names_are_those_that_the_list_of_models_prints(caches, call, tmp_path):
    put(caches, "acme/whole", HF | {"model.safetensors": weights()})
    put(caches, "acme/two", HF | {"model.safetensors": weights(), "a-q4.gguf": b"GGUF", "a-q6.gguf": b"GGUF"}, ref="v2")
    put(caches, "acme/no-weights", HF)
    root = put(caches, "acme/half", HF)
    (root / "blobs" / f"{'0' * 64}.pixtral.incomplete").write_bytes(b"x")
    root = put(caches, "acme/more", HF | {"model.safetensors": weights()})
    (root / "blobs" / f"{'0' * 64}.pixtral.incomplete").write_bytes(b"x")
    index = b'{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    root = put(caches, "acme/shard", HF | {"model.safetensors.index.json": index, "m-1.safetensors": weights()})
    (root / "blobs" / f"{'0' * 64}.pixtral.incomplete").write_bytes(b"x")
    assert call("export", "tiny", str(tmp_path / "tiny model.q4"))[0] == 0
    listed = {model["name"] for model in json.loads(call("cache", "list", "--json")[1])["models"]}
    assert len(listed) == 8 and set(call("completions", "cached")[1].splitlines()) == listed
    models = call("completions", "models")[1].splitlines()
    assert models[:2] == ["tiny", "mistral-community/pixtral-12b"]
    assert set(models[2:]) == {name for name in listed if name.startswith("acme/")}
    assert call("completions", "serialized")[1].splitlines() == [str(tmp_path / "tiny model.q4")]


@pytest.mark.parametrize(("visible", "number"), [(None, 3), ("", 0), ("0", 1), ("0,2", 2), ("0,1,2,3", 3)])
def test_gpus_are_counted_by_their_device_files(tmp_path, monkeypatch, visible, number):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).write_text("")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert completions.count_gpus(tmp_path) == number


def test_pictures_are_the_files_that_can_be_read():
    from PIL import Image

    from pixtral_cli.prompt.media import FORMATS

    known = {ending[1:] for ending, name in Image.registered_extensions().items() if name in FORMATS}
    offered = {Image.registered_extensions()[f".{ending}"] for ending in completions.IMAGE_ENDINGS}
    assert set(completions.IMAGE_ENDINGS) <= known and offered == set(FORMATS)


def whole_program():
    from typer.main import get_command

    from pixtral_cli.cli import main

    command = get_command(main.app)
    with command.make_context("pixtral", ["cache"], resilient_parsing=True) as context:
        return program.read(context)


def test_every_flag_that_names_a_place_on_the_disk_or_a_model_completes():
    flags = [flag for command in whole_program().walk() for flag in command.flags if flag.values]
    places = ("PATH", "FILE", "DIR", "PICTURE", "FILE|-")
    paths = [flag for flag in flags if flag.metavar in places or "model-path" in flag.names[-1]]
    assert len(paths) >= 15 and [flag.names for flag in paths if flag.values.files is None] == []


def test_every_flag_that_takes_one_of_a_few_words_offers_them():
    flags = [flag for command in whole_program().walk() for flag in command.flags if "|" in flag.metavar]
    wrong = [f for f in flags if f.metavar != "FILE|-" and "|".join(f.values.words) != f.metavar]
    assert flags and wrong == []


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A file. Repeatable, order kept.", "A file"),
        ("Default: 512MiB.", "Default: 512MiB"),
        ("Above 1.5 it is wild, e.g. here.\nMore.", "Above 1.5 it is wild, e.g. here"),
        ("No stop", "No stop"),
    ],
)
def test_a_description_is_the_first_sentence_of_the_help(text, first):
    assert program.first_sentence(text) == first
