"""Torch's threads do not wait awake for each other for long, unless the user wants that."""

import json
import subprocess
import sys

import pytest
from support.processes import PATIENCE, clean_environment

CODE = """
import json, os, sys
sys.argv = ["pixtral", "--version"]
from pixtral_cli.__main__ import main
try:
    main()
finally:
    print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules]))
"""


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_the_program_says_how_long_threads_wait_before_torch_is_loaded(given, spins):
    kept = {name: value for name, value in clean_environment().items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", CODE], env=kept | given, capture_output=True, timeout=PATIENCE)
    assert json.loads(done.stdout.splitlines()[-1]) == [spins, False]
