"""deploy/ keeps its word: what it starts is ours, and nginx, systemd and YAML read it."""

import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from support.processes import PATIENCE, PROGRAM, run_process
from support.serving import JSON, hello, served

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") or "nginx"
SYSTEMD = shutil.which("systemd-analyze")
FILES = ("Dockerfile", "pixtral.service", "truss/config.yaml", "README.md")
needs_nginx = pytest.mark.skipif(not os.path.exists(NGINX), reason="no nginx")


def text(name):
    return (DEPLOY / name).read_text()


def flags_of_serve():
    return set(re.findall(r"--[a-z][a-z-]+", run_process(PROGRAM, ["serve", "--help"]).stdout.decode()))


def test_every_flag_that_deployment_gives_to_serve_is_one_of_its_flags():
    commands = re.findall(r"pixtral(?: |\", \")serve\b.*", "".join(map(text, FILES)))
    given = {flag for command in commands for flag in re.findall(r"--[a-z][a-z-]+", command)}
    assert {"--host", "--port", "--insecure"} <= given and given <= flags_of_serve()


def test_the_readme_names_every_file():
    files = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    linked = set(re.findall(r"\]\(([^)]+)\)", text("README.md")))
    assert files - {"README.md", "Dockerfile.dockerignore"} == linked


def test_the_truss_starts_serve_with_the_secret_as_token_and_asks_our_routes(tmp_path):
    config = yaml.safe_load(text("truss/config.yaml"))
    server = config["docker_server"]
    assert set(config["secrets"]) == {"hf_access_key"} and config["secrets"]["hf_access_key"] is None
    fake = tmp_path / "pixtral"
    fake.write_text('#!/bin/sh\necho "$HF_TOKEN $@"\n')
    fake.chmod(0o755)
    (tmp_path / "hf_access_key").write_text("hf_abc\n")
    command = shlex.split(server["start_command"].replace("/secrets/", f"{tmp_path}/"))
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=20)
    token, name, *flags = done.stdout.split()
    assert (token, name) == ("hf_abc", "serve")
    assert flags[flags.index("--port") + 1] == str(server["server_port"]) and server["server_port"] != 8080
    asked = (server["readiness_endpoint"], server["liveness_endpoint"], server["predict_endpoint"])
    assert asked == ("/ready", "/health", "/predict")


def test_the_image_copies_what_the_wheel_is_built_from_and_nothing_that_is_ignored():
    copied = [
        name for line in re.findall(r"^COPY (?!--)(.*) \S+$", text("Dockerfile"), re.MULTILINE) for name in line.split()
    ]
    let_in = [line[1:] for line in text("Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    assert copied == let_in and all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "README.md", "pixtral_cli", "weights_cache"} <= set(copied)


def test_the_images_health_check_fails_where_nobody_answers():
    (command,) = re.findall(r"^    CMD (\[.*\])$", text("Dockerfile"), re.MULTILINE)
    _, option, code = json.loads(command)
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = code.replace(":8000", f":{server.server_port}")
        assert "/health" in there and there != code
        codes = [subprocess.run([sys.executable, option, there], stderr=subprocess.DEVNULL).returncode]
        server.shutdown()
    codes.append(subprocess.run([sys.executable, option, there], stderr=subprocess.DEVNULL).returncode)
    assert codes[0] == 0 and codes[1] != 0


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.mark.skipif(SYSTEMD is None, reason="no systemd-analyze")
def test_systemd_reads_the_unit_and_waits_longer_than_the_drain(tmp_path):
    unit = text("pixtral.service").replace("/opt/pixtral/bin/pixtral", "/bin/true")
    (tmp_path / "pixtral.service").write_text(unit)
    done = subprocess.run([SYSTEMD, "verify", tmp_path / "pixtral.service"], capture_output=True, text=True, timeout=60)
    if "Failed to" in done.stderr and "bus" in done.stderr:
        pytest.skip("no systemd to ask")
    assert done.returncode == 0 and "pixtral.service" not in done.stderr, done.stderr
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > 30


def free_ports(count):
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def configured(folder, port, upstreams):
    """Our nginx.conf with other ports, and every file of nginx's below `folder`."""
    config = text("nginx.conf").replace("/run/pixtral-nginx.pid", f"{folder}/pid")
    for ours, other in zip(("8000", "8001", "8002"), (port, *upstreams), strict=True):
        assert f"127.0.0.1:{ours}" in config
        config = config.replace(f"127.0.0.1:{ours}", f"127.0.0.1:{other}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(config.replace("http {", "http {\n" + paths))
    return [NGINX, "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf"]


@needs_nginx
def test_nginx_accepts_the_configuration(tmp_path):
    done = subprocess.run([*configured(tmp_path, 1, (2, 3)), "-t"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and "warn" not in done.stderr, done.stderr


@contextmanager
def nginx_before(folder, *upstreams):
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [*configured(folder, port, upstreams), "-g", "daemon off; master_process off;"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


def wait_for(url, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(url + "/health", timeout=5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ask(url, **more):
    body = json.dumps(hello(**more)).encode()
    return urllib.request.urlopen(urllib.request.Request(url + "/v1/chat/completions", body, JSON), timeout=60)


@needs_nginx
@pytest.mark.slow
def test_behind_nginx_streams_arrive_as_they_come_and_a_draining_server_is_passed_over(tmp_path):
    with served() as first, served() as second:
        ports = [server.url.rpartition(":")[2] for server in (first, second)]
        with nginx_before(tmp_path, *ports) as url:
            with pytest.raises(urllib.error.HTTPError, match="421"):  # a page of another name, resolved to here
                urllib.request.urlopen(urllib.request.Request(url + "/version", headers={"Host": "evil.example"}))
            stream = ask(url, stream=True, max_tokens=300, ignore_eos=True)
            arrivals = [time.monotonic() for line in stream if line.strip()]
            gaps = sum(later - earlier > 0.0005 for earlier, later in itertools.pairwise(arrivals))
            assert len(arrivals) > 100 and gaps > 50  # many pieces, not one at the end

            running = [ask(url, stream=True, max_tokens=600, ignore_eos=True) for _ in range(2)]
            first.process.terminate()
            first.wait_for("stopping")
            assert [ask(url, max_tokens=2).status for _ in range(4)] == [200] * 4
            assert all(response.read().endswith(b"[DONE]\n\n") for response in running)
            assert first.process.wait(30) == 0
            assert [ask(url, max_tokens=2).status for _ in range(4)] == [200] * 4
