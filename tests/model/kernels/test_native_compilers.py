"""Each C compiler that is on this machine makes the library without a warning: gcc 10 and newer, clang 14 and newer."""

import re
import shutil
import subprocess
import sysconfig

import pytest

from pixtral_cli.model import native_library

SOURCES = sorted((native_library.FOLDER / "native").glob("*.c"))
NAMES = ("gcc", *(f"gcc-{version}" for version in range(10, 16)), "aarch64-linux-gnu-gcc")
NAMES += ("clang", *(f"clang-{version}" for version in range(14, 22)))
COMPILERS = [name for name in NAMES if shutil.which(name)]
OPTIONS = ("-std=c11", "-O1", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-DPy_LIMITED_API=0x030b0000")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMPILERS, reason="no C compiler")]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_it_is_compiled_without_a_warning(compiler, tmp_path):
    command = [compiler, *OPTIONS, f"-I{sysconfig.get_paths()['include']}", "-c", *map(str, SOURCES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and not re.search("warning", done.stderr), done.stderr[-3000:]
    assert len(list(tmp_path.glob("*.o"))) == len(SOURCES)
