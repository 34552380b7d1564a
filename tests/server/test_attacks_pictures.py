"""Bombs: pictures small to send and dear to read, each tried in a process of its own that may take only so much.

A process has the memory that a picture of the limit in pixels needs, and a time that is far above what any of these
takes on a busy machine and far below what they took, or would have taken, unguarded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import clean_environment

READ = """
import base64, json, resource, sys, time
from support import bombs
from pixtral_cli.errors import PixtralError
from pixtral_cli.server.media_policy import RequestImages, MediaPolicy
import PIL.Image
name, arguments = json.loads(sys.argv[1])
opened = RequestImages(MediaPolicy()).opened
uri = "data:;base64," + base64.b64encode(getattr(bombs, name)(*arguments)).decode()
def taken():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
limit = taken() + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
start = time.process_time()
try:
    with opened(uri) as picture:
        said = "%dx%d" % picture.size
except PixtralError as error:
    said = str(error)
print(json.dumps([said, time.process_time() - start, len(uri)]))
"""


def read(name, *arguments, mebibytes, seconds=60):
    """What was said of the bomb, when it had `mebibytes` and `seconds`."""
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([name, arguments]), str(mebibytes)],
        capture_output=True,
        env=clean_environment(PYTHONPATH=f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    said, taken, _ = json.loads(done.stdout)
    assert taken < seconds
    assert "MemoryError" not in said and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("png", (20_000, 9_000)), ("png", (100_000, 2_000)), ("gif", (20_000, 9_000)), ("tiff", (20_000, 9_000))],
)
def test_more_pixels_than_allowed_are_refused_by_the_header(name, arguments):
    assert "178,000,000" in read(name, *arguments, mebibytes=64)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("png_profile", (500_000_000,), "damaged"),
        ("png_texts", (2_000, 1_000_000), "damaged"),
        ("png_chunks", (1_000_000,), "too many chunks"),
        ("png_exif", (2_000, 10_000_000), "8x8"),
        ("tiff_tags", (2_000, 10_000_000), "8x8"),
        ("tiff_strips", (3_000_000,), "damaged"),
        ("gif_comment", (10_000_000,), "8x8"),
        ("gif_extensions", (5_000_000,), "known format"),
        ("gif_frame", (60_000, 60_000), "pixels"),
        ("jpeg_scans", (4_000, 4_000, 2_000), "too many scans"),
        ("jpeg_segments", (1_000_000,), "too many segments"),
    ],
)
def test_what_a_format_may_hold_beside_its_pixels_takes_little(name, arguments, said):
    assert said in read(name, *arguments, mebibytes=256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("png", (13_340, 13_340)),
        ("png", (13_340, 13_340, 6)),
        ("png", (13_340, 13_340, 0, 16)),
        ("gif", (13_340, 13_340)),
        ("tiff", (13_340, 13_340)),
        ("jpeg_scans", (13_340, 13_340, 50)),
    ],
)
def test_the_most_pixels_that_are_allowed_fit_into_a_stated_memory(name, arguments):
    size = f"{arguments[0]}x{arguments[1]}"
    assert read(name, *arguments, mebibytes=1_900) == size


@pytest.mark.slow
def test_webp_needs_half_as_much_again_as_its_decoder_has_canvases_of_its_own():
    assert read("webp", 13_000, 13_000, mebibytes=2_900) == "13000x13000"


RESIDENT = """
import base64, sys
from concurrent.futures import ThreadPoolExecutor
from support import bombs
from pixtral_cli.server.media_policy import RequestImages, MediaPolicy
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024
opened = RequestImages(MediaPolicy()).opened
def small(uri):
    with opened(uri) as picture:
        return picture.resize((64, 64)).size
uri = "data:;base64," + base64.b64encode(bombs.png(8000, 8000)).decode()
small("data:;base64," + base64.b64encode(bombs.png(8, 8)).decode())
before = resident()
with ThreadPoolExecutor(3) as threads:
    for _ in range(3):
        list(threads.map(small, [uri] * 3))
    print(resident() - before)
"""


def test_the_memory_of_large_pictures_is_given_back():
    path = f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, check=True, env=clean_environment(PYTHONPATH=path)
    )
    assert int(done.stdout) < 100
