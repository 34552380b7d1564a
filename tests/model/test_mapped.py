"""A loaded model's weights are the file's own pages: nothing of them is copied on a CPU."""

import json
import subprocess
import sys

import pytest
from gguf import GGMLQuantizationType as Kind
from support import builders, format_builders, older_files
from support.processes import clean_environment

from pixtral_cli import Pixtral

SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "head_dim": 64}
SAVED = ("q4_0", "q4_k", "q6_k", "nf4", "fp8", "bfloat16")
OLDER = ("q4_0", "q4_k", "nf4")
GGUF = {"q4_0": Kind.Q4_0, "q8_0": Kind.Q8_0, "bf16": Kind.BF16}
PROGRAM = """
import json, os, sys
from pixtral_cli import Pixtral

def own():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("RssAnon:")))

def mapped(path):
    '''Pages of the file that are in this process's memory.'''
    with open("/proc/self/smaps") as maps:
        regions = maps.read().split(path)[1:]
    return sum(1024 * int(region.split("Rss:")[1].split()[0]) for region in regions)

Pixtral.load("tiny", devices="cpu").complete("a", max_new_tokens=1)  # what any model takes
for keyword, path in json.loads(sys.argv[1]):
    if child := os.fork():  # so that nothing is left of one for the next
        assert os.waitpid(child, 0)[1] == 0
        continue
    before = own()
    model = Pixtral.load(**{keyword: path}, devices="cpu")
    print(own() - before, mapped(path), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """What loading each file has taken of memory of its own, and of its pages, as parts of the file's length."""
    place = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(place / "hf", **SIZES)
    builders.add_processor(place / "hf")
    paths = {("saved", encoding): place / encoding for encoding in SAVED}
    for (_, encoding), path in paths.items():
        Pixtral.load(place / "hf", quantization_encoding=encoding).save(path)
    for encoding in OLDER:
        paths["older", encoding] = place / f"older {encoding}"
        older_files.write(paths["older", encoding], place / encoding)
    for name, kind in GGUF.items():
        paths["gguf", name] = place / f"{name}.gguf"
        format_builders.gguf_text(place / "hf", paths["gguf", name], lambda _, kind=kind: kind)
    asked = [
        ("model_path" if form == "gguf" else "serialized_model_path", str(path)) for (form, _), path in paths.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)], capture_output=True, text=True, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr
    found = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    return {
        key: [number / path.stat().st_size for number in numbers]
        for (key, path), numbers in zip(paths.items(), found, strict=True)
    }


@pytest.mark.parametrize("encoding", SAVED)
def test_loading_a_saved_model_takes_hardly_any_memory_of_its_own(taken, encoding):
    assert taken["saved", encoding][0] < 0.05


@pytest.mark.parametrize("name", GGUF)
def test_of_a_gguf_only_the_rows_that_rotate_are_put_in_order(taken, name):
    """Those of q and k, which are a sixteenth of this model: their heads lie otherwise there."""
    assert taken["gguf", name][0] < 0.12


@pytest.mark.parametrize("encoding", OLDER)
def test_a_file_in_an_older_order_is_not_in_memory_twice(taken, encoding):
    own, mapped = taken["older", encoding]
    assert 0.8 < own < 1.2 and mapped < 0.3
