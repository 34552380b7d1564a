"""Promises of the safetensors reader; oracle: the safetensors package. Knows no model."""

import json
import random
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from weights_cache.errors import CheckpointCorrupt
from weights_cache.formats.safetensors import SafetensorsFile

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16,
    torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with this header, padded to 8; `length` is what it claims, if not the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def written(tmp_path: Path):
    """Writes bytes to a file and returns its path."""

    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_as_it_was_saved(tmp_path: Path, dtype: torch.dtype):
    torch.manual_seed(1)
    saved = {
        "matrix": torch.randn(5, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.ones(0, 4).to(dtype),
    }
    save_file(saved, tmp_path / "model.safetensors")

    file = SafetensorsFile(tmp_path / "model.safetensors")

    assert file.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        found = file.weight(name)
        assert found.dtype == dtype and found.shape == tensor.shape
        assert bytes(found.contiguous().view(-1).view(torch.uint8).tolist()) == bytes(
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )


def test_headers_tell_dtype_shape_and_bytes_as_the_package_does(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(7, 3, dtype=torch.bfloat16), "b": torch.zeros(2)}, path, metadata={"format": "pt"})

    infos = SafetensorsFile(path).tensors

    with safetensors.safe_open(path, "pt") as oracle:
        for name in oracle.keys():
            part = oracle.get_slice(name)
            assert (infos[name].dtype, list(infos[name].shape)) == (part.get_dtype(), part.get_shape())
    assert infos["a"].nbytes == 42 and infos["a"].file == path


def test_tensors_lie_in_the_files_mapping_and_are_not_copied(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1024), "b": torch.ones(1024)}, path)
    file = SafetensorsFile(path)
    first, again, other = file.weight("a"), file.weight("a"), file.weight("b")

    assert first.data_ptr() == again.data_ptr()
    assert abs(other.data_ptr() - first.data_ptr()) == 4096
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    spans = [[int(end, 16) for end in span.split("-")] for span in mapped]
    assert any(begin <= first.data_ptr() < end for begin, end in spans)


def test_tensors_stay_valid_after_their_file_object_is_gone(tmp_path: Path):
    save_file({"a": torch.arange(2048)}, tmp_path / "model.safetensors")
    tensor = SafetensorsFile(tmp_path / "model.safetensors").weight("a")
    assert tensor.sum() == 2047 * 1024


def test_opening_and_naming_all_tensors_reads_no_data(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.ones(4, 2**20) for i in range(4)}, path)  # 64 MiB

    file = SafetensorsFile(path)
    tensors = [file.weight(name) for name in file.tensors]
    assert resident_bytes(path) < 2**20
    tensors[0].sum()
    assert resident_bytes(path) >= 2**24


def resident_bytes(path: Path) -> int:
    """Bytes of `path` that this process has in memory through mappings."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    before = path.read_bytes()
    SafetensorsFile(path).weight("a").fill_(7)
    assert path.read_bytes() == before
    assert SafetensorsFile(path).weight("a").sum() == 0


def test_a_tensor_off_its_alignment_is_still_read_right(written):
    values = torch.tensor([1.5, -2.0])
    header = {"odd": entry("U8", [1], [0, 1]), "a": entry("F32", [2], [1, 9])}
    file = SafetensorsFile(written(raw(header, b"\x07" + values.numpy().tobytes())))
    assert file.weight("a").equal(values) and file.weight("odd").item() == 7
    assert file.weight("a").data_ptr() % 4 == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"\x01\x02", "2 bytes"),
        (raw({}, length=10**6), "cut short"),
        (raw({}, length=2**64 - 1), "cut short"),
        (raw(b"not json"), "not valid JSON"),
        (raw(b"\xff\xfe"), "not valid JSON"),
        (raw(b"[" * 100_000), "not valid JSON"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (raw([1, 2]), "not a JSON object"),
        (raw(b'{"a": 1, "a": 2}'), "occurs twice"),
        (raw({"a": 3}), "not described"),
        (raw({"a": {}}), "unknown dtype"),
        (raw({"a": entry(dtype="F37")}, bytes(8)), "unknown dtype"),
        (raw({"a": entry(dtype=["F32"])}, bytes(8)), "unknown dtype"),
        (raw({"a": entry(shape=[-2])}, bytes(8)), "not a list of sizes"),
        (raw({"a": entry(shape=[2.0])}, bytes(8)), "not a list of sizes"),
        (raw({"a": entry(shape=[True, 2])}, bytes(8)), "not a list of sizes"),
        (raw({"a": entry(shape="2")}, bytes(8)), "not a list of sizes"),
        (raw({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "offsets span 8"),
        (raw({"a": entry(shape=[3])}, bytes(8)), "needs 12 bytes"),
        (raw({"a": entry(offsets=[-8, 0])}, bytes(8)), "offsets"),
        (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "offsets"),
        (raw({"a": entry(offsets=[0, 8, 16])}, bytes(16)), "offsets"),
        (raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps 'a'"),
        (raw({"a": entry(), "b": entry()}, bytes(8)), "overlaps 'a'"),
        (raw({"a": entry(offsets=[8, 16])}, bytes(16)), "gap after 'the header'"),
        (raw({"a": entry()}, bytes(7)), "cut short"),
        (raw({"a": entry()}, bytes(9)), "describes only"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_header_that_cannot_be_trusted_is_refused_with_its_file_and_reason(written, content: bytes, reason: str):
    path = written(content)
    with pytest.raises(CheckpointCorrupt) as caught:
        SafetensorsFile(path)
    assert reason in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.hint


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        SafetensorsFile(tmp_path / "absent.safetensors")


def test_a_file_cut_anywhere_is_refused(written):
    good = raw({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(16))
    for length in range(len(good)):
        with pytest.raises(CheckpointCorrupt):
            SafetensorsFile(written(good[:length]))
    assert len(SafetensorsFile(written(good)).tensors) == 2


@pytest.mark.parametrize("seed", range(8))
def test_mutated_headers_are_refused_or_open_just_as_the_package_opens_them(tmp_path: Path, seed: int):
    """100 mutations a seed. What opens here opens in the package too, and each tensor lies inside the file."""
    chance = random.Random(seed)
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(4, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0)}, path)
    good = path.read_bytes()
    opened = 0
    for _ in range(100):
        path.write_bytes(mutated(good, chance))
        try:
            file = SafetensorsFile(path)
        except CheckpointCorrupt:
            continue
        opened += 1
        assert sum(info.nbytes for info in file.tensors.values()) <= path.stat().st_size
        with safetensors.safe_open(path, "pt") as oracle:
            for name in oracle.keys():
                assert bits(file.weight(name)) == bits(oracle.get_tensor(name))
    assert opened < 100  # the mutations do bite


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tuple(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def mutated(good: bytes, chance: random.Random) -> bytes:
    """One of: bytes changed in the header, a digit changed, a piece removed, doubled or inserted, the length bent."""
    header_end = 8 + int.from_bytes(good[:8], "little")
    content = bytearray(good)
    kind = chance.randrange(5)
    place = chance.randrange(8, header_end)
    if kind == 0:
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(header_end)] = chance.randrange(256)
    elif kind == 1:
        digits = [i for i in range(8, header_end) if chr(content[i]).isdigit()]
        content[chance.choice(digits)] = ord(chance.choice("0123456789-."))
    elif kind == 2:
        del content[place : place + chance.randint(1, 20)]
    elif kind == 3:
        content[place:place] = content[place : place + chance.randint(1, 40)]
    else:
        content[:8] = struct.pack(
            "<Q", chance.choice([0, 1, header_end, 2**31, 2**63, len(good) - 8, chance.randrange(400)])
        )
    return bytes(content)


def test_a_released_tensor_gives_its_memory_back_and_can_be_read_again(tmp_path):
    path = tmp_path / "model.safetensors"
    weight = torch.arange(2**20, dtype=torch.float32)
    save_file({"a": weight, "b": weight + 1}, path)
    file = SafetensorsFile(path)
    assert file.weight("a").sum() == weight.sum()
    before = resident_bytes(path)
    file.release("a")
    assert before >= 2**22 and resident_bytes(path) < before - 4_000_000
    assert torch.equal(file.weight("a"), weight) and torch.equal(file.weight("b"), weight + 1)
