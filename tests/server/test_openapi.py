"""What /openapi.json says holds for whatever schemathesis makes of it, sense and nonsense."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from support.serving import JSON, served

SHORT = ("--max-length", "64")
"""However many tokens a made-up request asks for."""
BEYOND_SCHEMAS = "positive_data_acceptance"
"""Not every request that the schema allows has sense: a result of a call that nobody made, a prompt beside messages."""


@pytest.fixture(scope="module")
def server():
    with served(*SHORT) as server:
        yield server


def schemathesis(server, folder, *arguments):
    program = Path(sys.executable).parent / "schemathesis"
    always = ["--seed", "1", "--generation-database", "none", "--exclude-checks", BEYOND_SCHEMAS, "--no-color"]
    done = subprocess.run(
        [program, "run", server.url + "/openapi.json", *always, *arguments],
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Selected: 11/11" in done.stdout and "Tested: 11" in done.stdout
    assert server.open("/ready").status == 200 and "Traceback" not in server.said()


def test_every_answer_is_one_of_those_described(server, tmp_path):
    schemathesis(server, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "5")


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_answer_to_much_more_is_one_of_those_described(server, tmp_path):
    schemathesis(server, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "80")


def test_methods_that_are_not_described_are_told_which_are(server):
    for path, described in server.json("/openapi.json")["paths"].items():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - {name.upper() for name in described}:
            request = Request(server.url + path.replace("{name}", "tiny"), b"{}", JSON, method=method)
            with pytest.raises(HTTPError) as refused:
                urlopen(request, timeout=10)
            allowed = {name.strip().lower() for name in refused.value.headers["Allow"].split(",")}
            assert refused.value.code == 405 and allowed - {"head"} == set(described) - {"head"}
