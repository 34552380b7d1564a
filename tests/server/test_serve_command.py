"""`pixtral serve` as people start it: what it says, what it refuses, what its flags mean."""

import json
import os
import re
import resource
import socket
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.processes import PROGRAM, imported_by, run_process
from support.serving import hello, served

from pixtral_cli import Pixtral
from pixtral_cli.errors import PixtralError
from pixtral_cli.server.process import listen, url

ROOT = Path(__file__).resolve().parents[2]
SERVER_MODULES = ["fastapi", "prometheus_client", "starlette", "uvicorn"]
KEYS = {"PIXTRAL_API_KEY": "first-key second-key"}


MEMORY = ("--kv-cache-memory", "64MiB", "--image-cache-memory", "1000000")
LIMITS = ("--max-body-mib", "1", "--max-images", "1", "--max-queue", "7")
MEDIA = ("--media-path", str(ROOT / "examples"), "--allow-private-media", "127.0.0.0/8")


@pytest.fixture(scope="module")
def plain():
    with served("--max-new-tokens", "5", *MEMORY, *LIMITS, *MEDIA) as server:
        yield server


@pytest.fixture(scope="module")
def keyed():
    names = ("--served-model-name", "it's", "--served-model-name", "eyes")
    with served("--host", "0.0.0.0", *names, "--allow-media-domain", "pictures.example", env=KEYS) as server:
        yield server


@pytest.fixture
def pictures_at():
    """The address of an HTTP server on this machine that has the example pictures."""
    handler = partial(SimpleHTTPRequestHandler, directory=ROOT / "examples")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def about(*pictures, model="tiny"):
    """A question about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": parts}]}


def line_to_try(server):
    return re.search(r"^try +(.*)$", server.said(), re.MULTILINE)[1]


def run_in_shell(line, **env):
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=60, env={"PATH": "/usr/bin:/bin"} | env)


def test_it_is_live_and_ready_and_serves_the_page(plain):
    assert [plain.open(path).status for path in ("/health", "/ready", "/", "/version")] == [200] * 4


def test_the_start_tells_address_model_encoding_memory_and_limits(plain):
    said = plain.said()
    for words in ("tiny: bfloat16 on cpu", plain.url + "/v1", "weights 13.9 MiB", "KV cache 64.0 MiB", "1.0 MiB"):
        assert words in said
    assert "16 requests at once, 7 waiting; a request: up to 1 MiB, pictures up to 1" in said
    assert "none is asked for" in said


def test_the_line_to_try_gets_an_answer_when_it_is_pasted(plain):
    done = run_in_shell(line_to_try(plain))
    assert done.returncode == 0 and json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_with_keys_the_line_to_try_works_once_the_key_is_set(keyed):
    line = line_to_try(keyed)
    assert "first-key" not in keyed.said()
    assert json.loads(run_in_shell(line).stdout)["error"]["type"] == "authentication_error"
    answer = json.loads(run_in_shell(line, PIXTRAL_API_KEY="second-key").stdout)
    assert answer["model"] == "it's" and answer["choices"][0]["message"]["content"]


def test_the_model_has_the_names_that_it_was_given(keyed):
    listed = keyed.json("/v1/models", headers={"Authorization": "Bearer first-key"})
    assert [model["id"] for model in listed["data"]] == ["it's", "eyes"]


def test_limits_are_those_of_the_flags_and_errors_name_them(plain):
    large = plain.open("/v1/chat/completions", about("data:image/png;base64," + "A" * 2**20))
    many = plain.open("/v1/chat/completions", about("shapes.png", "sign.png"))
    assert large.status == 413 and "--max-body-mib 1" in json.load(large)["error"]["message"]
    assert many.status == 400 and "--max-images is 1" in json.load(many)["error"]["message"]


def test_pictures_come_from_where_the_flags_allow(plain, keyed, pictures_at):
    web = pictures_at + "/sign.png"
    key = {"Authorization": "Bearer first-key"}
    assert [plain.open("/v1/chat/completions", about(name)).status for name in ("sign.png", web)] == [200, 200]
    for name in ("sign.png", web):
        refused = keyed.open("/v1/chat/completions", about(name, model="eyes"), key)
        assert refused.status == 400, name
    assert "not allowed" in json.load(refused)["error"]["message"]


def test_flags_for_answers_hold_where_a_request_does_not_say(plain):
    def length(**more):
        return plain.json("/v1/chat/completions", hello(ignore_eos=True, **more))["usage"]["completion_tokens"]

    assert [length(), length(max_tokens=7)] == [5, 7]


def test_each_request_is_told_in_one_line_with_its_tokens(plain):
    usage = plain.json("/v1/chat/completions", hello(max_tokens=3, ignore_eos=True))["usage"]
    assert plain.open("/nowhere?secret=1").status == 404
    told = plain.wait_for(r"(?m)^GET /nowhere .*$")
    assert re.fullmatch(r"GET /nowhere 404, \d+ ms: There is nothing at /nowhere", told[0])
    answered = [line for line in plain.said().splitlines() if line.startswith("POST /v1/chat")][-1]
    assert re.fullmatch(rf"POST /v1/chat/completions 200, \d+ ms, {usage['prompt_tokens']} \+ 3 tokens", answered)
    assert "GET /health" not in plain.said() and "GET /ready" not in plain.said()


def test_why_a_request_was_refused_is_on_its_line_in_short_and_without_what_is_secret(plain, keyed):
    def told(server, *question):
        lines = len(server.said().splitlines())
        assert server.open("/v1/chat/completions", *question).status >= 400
        server.wait_for(rf"(?s)\A(.*\n){{{lines + 1}}}")
        return server.said().splitlines()[lines]

    line = told(plain, hello(colour="red"))
    assert re.fullmatch(r"POST /v1/chat/completions 400, \d+ ms: The field colour is not supported", line)
    line = told(plain, hello(**{"x\ny\x1b" * 5000: 1}))
    assert " 400, " in line and "\x1b" not in line and len(line) < 300
    line = told(plain, about("http://me:pw9@192.0.2.1/a.png?signature=key9#part"))
    assert "Cannot fetch http://192.0.2.1/a.png?…: " in line and "key9" not in line and "pw9" not in line
    assert re.search(r" 401, \d+ ms: An API key is needed", told(keyed, hello()))
    line = told(keyed, hello(), {"Authorization": "Bearer my-own-key"})
    assert re.search(r" 401, \d+ ms: This API key", line) and "my-own" not in line


def test_when_no_file_is_left_a_line_says_so_and_clients_wait():
    with served() as server:
        files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        most = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (files + 2, most[1]))
        address = server.url.removeprefix("http://").split(":")
        clients = [socket.create_connection((address[0], int(address[1]))) for _ in range(5)]
        server.wait_for("pixtral: .*Too many open files")
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, most)
        assert server.open("/health").status == 200
        for client in clients:
            client.close()
        assert "Traceback" not in server.said()


@pytest.mark.parametrize("command", [["serve"], ["run", "--serve"]])
def test_a_busy_port_is_one_sentence_before_anything_is_loaded(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_process(PROGRAM, [*command, "--model-path", "/no/such/model", "--port", port])
    sentence, hint = done.stderr.decode().splitlines()
    assert done.returncode == 1 and sentence == f"pixtral: error: Port {port} of 127.0.0.1 is in use."
    assert "--port" in hint and done.stdout == b""


def test_a_model_that_cannot_be_loaded_is_a_sentence_and_exit_code_1():
    done = run_process(PROGRAM, ["serve", "--model-path", "/no/such/model", "--port", "0"])
    assert done.returncode == 1 and "/no/such/model" in done.stderr.decode().splitlines()[-2]
    assert b"Traceback" not in done.stderr


def test_an_address_that_others_reach_is_refused_without_a_key():
    done = run_process(PROGRAM, ["serve", "--model-path", "/no/such/model", "--host", "0.0.0.0", "--port", "0"])
    sentence, hint = done.stderr.decode().splitlines()
    assert done.returncode == 1 and "no API key" in sentence and "--api-key" in hint and "--insecure" in hint


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", ""])
def test_an_address_that_is_not_this_machines_is_a_sentence(host):
    flags = ["serve", "--model-path", "/no/such/model", "--host", host, "--insecure", "--port", "0"]
    done = run_process(PROGRAM, flags)
    assert done.returncode == 1 and b"--host" in done.stderr and b"/no/such/model" not in done.stderr


def test_a_kv_cache_that_holds_next_to_nothing_is_refused_with_what_would_do():
    with pytest.raises(PixtralError, match=r"--kv-cache-memory has room for \d+ tokens") as refused:
        Pixtral.load("tiny", kv_cache_memory=1024)
    enough = int(re.search(r"(\d+)MiB", refused.value.hint)[1]) * 2**20
    assert Pixtral.load("tiny", kv_cache_memory=enough).max_length >= 256


def test_a_port_without_the_right_to_it_is_a_sentence(monkeypatch):
    def refuse(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(PixtralError, match="Port 80 needs rights") as refused:
        listen("127.0.0.1", 80)
    assert "1024" in refused.value.hint


def test_the_address_told_is_one_that_a_browser_here_can_open():
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]")):
        with listen(host, 0) as listener:
            assert url(host, listener) == f"http://{shown}:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kv-cache-memory", "8GB"], "--kv-cache-memory"),
        (["--kv-cache-memory", "0"], "not a size"),
        (["--image-cache-memory", "lots"], "8GiB, 512MiB or a number of bytes"),
        (["--allow-private-media", "10.0.0.1/8"], "host bits"),
        (["--port", "65536"], "at most 65535"),
        (["--drain-timeout", "-1"], "at least 0"),
        (["--media-path", "/no/such/folder"], "--media-path"),
        (["-p", "Hello"], "No such option: -p"),
    ],
)
def test_a_flag_that_cannot_be_meant_so_is_named(flags, words):
    done = run_process(PROGRAM, ["run", "--serve", *flags])
    assert done.returncode == 2 and words in done.stderr.decode() and "pixtral serve --help" in done.stderr.decode()


@pytest.mark.parametrize("arguments", [["serve", "--help"], ["tokenize", "--model-path", "tiny", "-p", "Hello"]])
def test_what_does_not_serve_imports_nothing_of_a_server(arguments):
    assert imported_by(*arguments, among=SERVER_MODULES) == []


def test_the_python_of_the_readme_streams_an_answer(plain, capsys):
    section = (ROOT / "README.md").read_text().partition("\n## Server\n")[2]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1].replace("http://127.0.0.1:8000", plain.url)
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out
