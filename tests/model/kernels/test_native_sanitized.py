"""The library in C compiled with AddressSanitizer and UBSan, under its own tests: it touches nothing beyond."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pixtral_cli.model import native_library

HERE = Path(__file__).parent
SOURCES = native_library.FOLDER / "native"
TESTS = sorted(
    {
        *HERE.glob("test_native*.py"),
        *HERE.glob("test_cpu_*.py"),
        HERE.with_name("test_native_ops.py"),
        HERE.with_name("test_native_decoder.py"),
    }
    - {Path(__file__)}
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
RUNTIME = ("libasan.so", "libubsan.so")
USE_IT = """
import os, pathlib
from pixtral_cli.model import native_library
native_library.FOLDER = pathlib.Path(os.environ["SANITIZED"])
"""
READ_TOO_FAR = """
import sanitized, torch
from pixtral_cli.model.kernels import native_matrix
from weights_cache.packed import PackedRows
matrix = native_matrix.matrix_of(PackedRows("q4_0", torch.zeros(3, 18, dtype=torch.uint8)))
matrix.rows += 100
native_matrix.look_up(matrix, torch.tensor([80]), torch.float32)
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None or not native_library.available(), reason="no gcc"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """That of a Python whose library is the sanitized one."""
    folder = tmp_path_factory.mktemp("sanitized")
    library = folder / "_native.abi3.so"
    sources = sorted(map(str, SOURCES.glob("*.c")))
    options = [
        "-std=c11",
        "-shared",
        "-fPIC",
        "-pthread",
        "-DPy_LIMITED_API=0x030b0000",
        f"-I{sysconfig.get_paths()['include']}",
    ]
    subprocess.run(["gcc", *options, *SANITIZE, *sources, "-o", str(library), "-lm"], check=True, timeout=240)
    (folder / "sanitized.py").write_text(USE_IT)
    loaded_first = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in RUNTIME]
    return os.environ | {
        "SANITIZED": str(folder),
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "LD_PRELOAD": " ".join(loaded_first),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "OMP_NUM_THREADS": "2",
    }


def run(environment, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=HERE.parents[2])


def test_a_read_beyond_a_weight_is_found(environment):
    done = run(environment, "-c", READ_TOO_FAR)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_librarys_own_tests_pass(environment, path):
    done = run(environment, "-m", "pytest", "-q", "-x", "-p", "sanitized", "-p", "no:cacheprovider", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
