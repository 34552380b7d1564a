"""Promises of reading GGUF files. Oracle: gguf-py writes the files, reads them back, and unpacks their tensors."""

import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from support import format_builders

from weights_cache import checkpoint
from weights_cache.encodings import GGML, GGML_NOT_READ
from weights_cache.errors import CheckpointCorrupt, NotYetSupported, WeightsError
from weights_cache.formats.gguf import GgufFile
from weights_cache.packed import PackedWeight, plain

VALUES = {
    "add_uint8": 200, "add_int8": -100, "add_uint16": 65000, "add_int16": -30000, "add_uint32": 2**32 - 1,
    "add_int32": -(2**31), "add_uint64": 2**64 - 1, "add_int64": -(2**63), "add_float64": 1e-300, "add_bool": True,
    "add_float32": 1e-5, "add_string": "où ça 🙂",
}  # fmt: skip
LISTS = {"texts": ["a", "", "où ça 🙂"], "ints": [1, -2, 3], "floats": [0.5, -1.25], "bools": [True, False]}


def write(path: Path, tensors: dict[str, np.ndarray] | None = None, edit=lambda writer: None, **raw) -> Path:
    """A GGUF by gguf-py; `raw` names the type of tensors that are packed already."""
    writer = GGUFWriter(path, "llama")
    edit(writer)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=raw.get(name))
    format_builders.finish(writer)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two tensors of 96 and 24 bytes; the second lies at a multiple of 32 after the first."""

    def edit(writer: GGUFWriter) -> None:
        for add, value in VALUES.items():
            getattr(writer, add)(f"test.{add}", value)
        for key, value in LISTS.items():
            writer.add_array(f"test.{key}", value)

    tensors = {"a.weight": np.arange(24, dtype=np.float32).reshape(4, 6), "b.weight": np.arange(12, dtype=np.float16)}
    return write(tmp_path / "small.gguf", tensors, edit)


def damaged(path: Path, data: bytes) -> WeightsError:
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and path.name in str(caught.value)
    return caught.value


def replaced(path: Path, old: bytes, new: bytes) -> bytes:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def test_metadata_of_every_type_is_what_was_written(path):
    metadata = GgufFile(path).metadata
    assert metadata["general.architecture"] == "llama"
    for add, value in VALUES.items():
        assert metadata[f"test.{add}"] == value and type(metadata[f"test.{add}"]) is type(value)
    for key, value in LISTS.items():
        assert metadata[f"test.{key}"] == value
    assert "test.nothing" not in metadata and metadata.get("test.nothing") is None


def test_tensors_are_those_that_gguf_py_reads(path):
    ours = GgufFile(path)
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert ours.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        info = ours.tensors[name]
        assert info.shape == tuple(reversed(tensor.shape.tolist())) and info.nbytes == tensor.n_bytes
        assert ours.weight(name).equal(torch.from_numpy(np.array(tensor.data)))


def test_a_tensor_shares_the_files_memory_and_never_writes_to_it(path):
    before = path.read_bytes()
    file = GgufFile(path)
    file.weight("a.weight").fill_(5)
    assert file.weight("a.weight").eq(5).all() and path.read_bytes() == before


def test_the_table_of_types_agrees_with_gguf_py():
    for number, kind in GGML.items():
        theirs = GGMLQuantizationType(number)
        assert (theirs.name, *gguf.GGML_QUANT_SIZES[theirs]) == (kind.word, kind.block, kind.block_bytes)
    assert {theirs.value: theirs.name for theirs in GGMLQuantizationType if theirs.value not in GGML} == GGML_NOT_READ


@pytest.mark.parametrize("kind", [GGMLQuantizationType(number) for number in GGML], ids=lambda kind: kind.name)
def test_every_type_is_unpacked_as_gguf_py_does(tmp_path, kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = 512
    generator = np.random.default_rng(kind.value)
    packed = generator.integers(0, 60, (6, columns // block * block_bytes), dtype=np.uint8)  # scales stay finite
    path = write(tmp_path / "m.gguf", {"w": packed}, w=kind)
    file = GgufFile(path)
    assert (file.tensors["w"].shape, file.tensors["w"].dtype) == ((6, columns), kind.name)
    weight = file.weight("w")
    if GGML[kind.value].packed:
        assert isinstance(weight, PackedWeight) and (weight.encoding, weight.shape) == (
            GGML[kind.value].name,
            (6, columns),
        )
        assert weight.rows.numpy().tobytes() == packed.tobytes() and weight.nbytes == packed.nbytes
    expected = torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))
    assert plain(weight).float().equal(expected.view(6, columns))


def test_rotary_rows_move_whole_when_they_are_packed(tmp_path):
    """Heads of 64 rows by 256 in q4_k; the order is that of unpacked rows."""

    def edit(writer: GGUFWriter) -> None:
        writer.add_embedding_length(256)
        writer.add_head_count(4)

    generator = np.random.default_rng(0)
    packed = generator.integers(0, 60, (256, 144), dtype=np.uint8)
    path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": packed}, edit, **{"blk.0.attn_q.weight": 12})
    opened = checkpoint.Checkpoint(path, {}, [path], form="gguf")
    name = "language_model.layers.0.self_attn.q_proj.weight"
    order = [head * 64 + 2 * i + half for head in range(4) for half in (0, 1) for i in range(32)]
    assert opened.weight(name).rows.equal(torch.from_numpy(packed[order]))
    whole = gguf.quants.dequantize(packed, GGMLQuantizationType.Q4_K)
    assert opened.tensor(name).equal(torch.from_numpy(whole[order]))


def test_headers_are_read_without_torch(path):
    code = (
        "import sys, pathlib; from weights_cache.formats.gguf import GgufFile; "
        f"assert len(GgufFile(pathlib.Path({str(path)!r})).tensors) == 2; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("alignment", [1, 8, 256])
def test_other_alignments_are_read(tmp_path, alignment):
    tensors = {"a": np.arange(7, dtype=np.float16), "b": np.arange(5, dtype=np.float32)}
    path = write(tmp_path / "m.gguf", tensors, lambda writer: writer.add_custom_alignment(alignment))
    file = GgufFile(path)
    for name, expected in tensors.items():
        assert file.weight(name).equal(torch.from_numpy(expected))


def test_a_file_cut_short_anywhere_is_refused(path):
    data = path.read_bytes()
    whole = max(entry.begin + entry.info.nbytes for entry in GgufFile(path)._parts[0].entries.values())
    for length in [*range(400), *range(400, whole, 37), whole - 1]:
        assert isinstance(damaged(path, data[:length]), CheckpointCorrupt)
    path.write_bytes(data[:whole])  # the padding after the last tensor may be missing
    assert len(GgufFile(path).tensors) == 2


def test_what_is_no_gguf_is_said_so(path):
    data = path.read_bytes()
    assert "GGUF" in str(damaged(path, b"GGML" + data[4:]))
    assert isinstance(damaged(path, b"GGUF" + struct.pack("<I", 1) + data[8:]), NotYetSupported)
    assert "big-endian" in str(damaged(path, b"GGUF" + struct.pack(">I", 3) + data[8:]))
    assert "version 4" in str(damaged(path, b"GGUF" + struct.pack("<I", 4) + data[8:]))
    path.unlink()
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        GgufFile(path)


HUGE = [2**16, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "metadata"])
def test_a_count_beyond_the_file_is_refused_before_anything_is_made_of_it(path, at, count):
    data = path.read_bytes()
    error = damaged(path, data[:at] + struct.pack("<Q", count) + data[at + 8 :])
    assert str(count) in str(error)


@pytest.mark.parametrize("count", HUGE)
def test_a_list_or_text_longer_than_the_file_is_refused(path, count):
    data = path.read_bytes()
    for key in ("test.texts", "test.ints", "test.add_string"):
        begin = data.index(key.encode()) + len(key) + 4
        begin += 4 if key != "test.add_string" else 0  # a list's item type comes before its length
        assert isinstance(damaged(path, data[:begin] + struct.pack("<Q", count) + data[begin + 8 :]), CheckpointCorrupt)


def table(data: bytes, name: bytes) -> int:
    """Where a tensor's number of dimensions stands."""
    return data.index(name, data.index(b"test.bools")) + len(name)


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"),
    [
        (0, "<I", 0, "dimensions"),
        (0, "<I", 5, "dimensions"),
        (0, "<I", 2**32 - 1, "dimensions"),
        (4, "<Q", 0, "shape"),
        (4, "<Q", 2**63, "shape"),
        (4, "<Q", 2**40, "cut short"),
        (20, "<I", 99, "type 99"),
        (20, "<I", 12, "multiple of 256"),
        (20, "<I", 16, "IQ2_XXS"),
        (24, "<Q", 31, "alignment"),
        (24, "<Q", 2**50, "cut short"),
        (24, "<Q", 2**64 - 32, "cut short"),
        (24, "<Q", 32, "overlaps"),
    ],
)
def test_a_tensor_that_contradicts_the_file_is_named(path, offset, form, value, said):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, table(data, b"a.weight") + offset, value)
    error = damaged(path, bytes(data))
    assert "a.weight" in str(error)
    assert said in str(error)


def test_doubled_names_are_refused(path):
    assert "b.weight" in str(damaged(path, replaced(path, b"a.weight", b"b.weight")))
    path = write(path, {"a": np.zeros(1, np.float32)}, lambda writer: writer.add_uint32("test.b", 1) or
                 writer.add_uint32("test.c", 1))  # fmt: skip
    assert "test.b" in str(damaged(path, replaced(path, b"test.c", b"test.b")))


@pytest.mark.parametrize("alignment", [0, 3, 2**31 + 1])
def test_an_alignment_that_is_no_power_of_two_is_refused(path, alignment):
    write(path, {"a": np.zeros(1, np.float32)}, lambda writer: writer.add_custom_alignment(64))
    data = path.read_bytes()
    begin = data.index(b"general.alignment") + len("general.alignment") + 4
    assert "alignment" in str(damaged(path, data[:begin] + struct.pack("<I", alignment) + data[begin + 4 :]))


def test_lists_of_lists_and_unknown_types_are_refused(path):
    data = path.read_bytes()
    key = data.index(b"test.ints") + len("test.ints")
    for value in (9, 13, 255):
        assert "type" in str(damaged(path, data[: key + 4] + struct.pack("<I", value) + data[key + 8 :]))
    for value in (13, 2**31):
        assert "type" in str(damaged(path, data[:key] + struct.pack("<I", value) + data[key + 4 :]))


def test_a_name_that_is_no_text_is_refused(path):
    assert "UTF-8" in str(damaged(path, replaced(path, b"a.weight", b"a.\xff\xfeight")))


@pytest.fixture
def split(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Five tensors in three files, split by gguf-py; their folder and what they hold."""
    tensors = {f"blk.{n}.ffn_up.weight": np.full((2, 8), n, np.float32) for n in range(5)}
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{key}")(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    format_builders.finish(writer)
    assert len(list(tmp_path.iterdir())) == 3
    return tmp_path, tensors


@pytest.mark.parametrize("given", ["folder", "first", "last", "all by weight path"])
def test_a_gguf_in_several_files_is_one_model(split, given):
    folder, tensors = split
    files = sorted(folder.iterdir())
    if given == "all by weight path":
        opened = checkpoint.open(None, files)
    else:
        opened = checkpoint.open({"folder": folder, "first": files[0], "last": files[2]}[given])
    assert opened.config["num_hidden_layers"] == 4 and len(opened.tensors) == 5
    for n, data in enumerate(tensors.values()):
        assert opened.tensor(f"language_model.layers.{n}.mlp.up_proj.weight").equal(torch.from_numpy(data))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_file_of_several_is_named(split, missing):
    files = sorted(split[0].iterdir())
    files[missing].unlink()
    with pytest.raises(CheckpointCorrupt, match=files[missing].name):
        checkpoint.open(split[0])


def test_a_file_of_several_under_another_name_is_not_taken_for_the_whole(split):
    first = min(split[0].iterdir())
    first.rename(split[0] / "renamed.gguf")
    with pytest.raises(CheckpointCorrupt, match="one of 3 files"):
        checkpoint.open(split[0] / "renamed.gguf")


def test_files_of_another_split_are_not_mixed_in(split):
    files = sorted(split[0].iterdir())
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(CheckpointCorrupt, match=r"blk\.4\.ffn_up"):
        checkpoint.open(split[0])
    write(files[1], {"other.weight": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointCorrupt, match="promises 5 tensors"):
        checkpoint.open(split[0])
