"""Encodings and the one-file model, from end to end: right, whole, and refused when they are not."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from support import builders, older_files

from pixtral_cli import Pixtral, PixtralError
from pixtral_cli.encoding_choices import find
from pixtral_cli.model.kernels import KernelLinear, native, nf4
from pixtral_cli.model.kernels.reference import ReferenceKernel
from pixtral_cli.source import Source
from weights_cache import codecs
from weights_cache.encodings import ENCODINGS
from weights_cache.errors import CheckpointCorrupt, DiskFull, SerializedTooNew, WeightsError, WriteFailed
from weights_cache.formats import serialized, serialized_writer
from weights_cache.formats.serialized import verify_path
from weights_cache.packed import PackedWeight

PACKED = ["q4_0", "q4_k", "q6_k"]
QUESTION = [{"role": "user", "content": "what is in the picture?"}]
OPTIONS = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Pixtral whose rows divide into every block."""
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32)
    builders.add_processor(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(folder, tmp_path):
    path = tmp_path / "model.pixtral"
    Pixtral.load(folder, quantization_encoding="q4_k").save(path)
    return path


@pytest.mark.parametrize("name", PACKED)
def test_packed_logits_are_those_of_the_exactly_decoded_weights(folder, name):
    """Within the rounding of bfloat16: each packed layer decoded once into float32."""
    model = Pixtral.load(folder, quantization_encoding=name).engine.model
    kernels = [layer for layer in model.modules() if isinstance(layer, KernelLinear)]
    packed = [layer for layer in kernels if isinstance(layer.weight, PackedWeight)]
    assert len(packed) == 3 * 7 + 1
    for layer in packed:
        x = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(1))
        wanted, got = x @ layer.weight.decoded().T, layer(x.bfloat16()).float()
        assert (got - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("name", [None, *PACKED, "nf4"])
def test_a_saved_model_answers_as_the_one_it_was_saved_from(folder, tmp_path, name):
    model = Pixtral.load(folder, quantization_encoding=name)
    path = tmp_path / "model.pixtral"
    model.save(path)
    again = Pixtral.load(serialized_model_path=path)
    first, second = (m.chat(QUESTION, logprobs=5, **OPTIONS) for m in (model, again))
    assert (second.token_ids, second.logprobs) == (first.token_ids, first.logprobs)
    assert (again.encoding, again.name, again.processor.recipe) == (model.encoding, model.name, model.processor.recipe)


def test_exporting_writes_the_very_file_that_saving_writes(folder, tmp_path):
    model = Pixtral.load(folder, quantization_encoding="q6_k")
    model.save(tmp_path / "saved")
    model.source.save(tmp_path / "exported", model.placement)
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "exported").read_bytes()


def test_double_quantisation_is_saved_and_loaded_as_it_is_and_takes_less_room(folder, tmp_path):
    plain, double, exported = (tmp_path / name for name in ("plain", "double", "exported"))
    Pixtral.load(folder, quantization_encoding="nf4").save(plain)
    model = Pixtral.load(folder, quantization_encoding="nf4", double_quantization=True)
    model.save(double)
    model.source.save(exported, model.placement)
    assert double.read_bytes() == exported.read_bytes() and double.stat().st_size < plain.stat().st_size
    again = Pixtral.load(serialized_model_path=double)
    assert again.engine.model.language_model.layers[0].mlp.up_proj.weight.nested
    first, second = (m.chat(QUESTION, logprobs=5, **OPTIONS) for m in (model, again))
    assert (second.token_ids, second.logprobs) == (first.token_ids, first.logprobs)
    again.save(exported)
    assert double.read_bytes() == exported.read_bytes()


@pytest.mark.parametrize("name", [None, "q4_k"])
def test_double_quantisation_is_refused_for_anything_but_nf4(folder, name):
    with pytest.raises(PixtralError, match="nf4") as refused:
        Pixtral.load(folder, quantization_encoding=name, double_quantization=True)
    assert "--double-quantization" in refused.value.hint


def test_scales_that_a_file_has_unpacked_are_not_said_to_be_packed(folder, tmp_path):
    plain, double = tmp_path / "plain", tmp_path / "double"
    wanted = {"quantization_encoding": "nf4", "double_quantization": True}
    Pixtral.load(folder, quantization_encoding="nf4").save(plain)
    Pixtral.load(folder, **wanted).save(double)
    with pytest.raises(PixtralError, match="nf4 already") as refused:
        Pixtral.load(serialized_model_path=plain, **wanted)
    assert "--double-quantization" in refused.value.hint
    assert Pixtral.load(serialized_model_path=double, **wanted).encoding == "nf4"


@pytest.mark.parametrize("name", [None, "bfloat16", "float32"])
def test_packing_the_picture_part_into_nothing_is_refused(folder, name):
    with pytest.raises(PixtralError, match=name or "no encoding") as refused:
        Pixtral.load(folder, quantization_encoding=name, quantize_vision=True)
    assert "--quantize-vision" in refused.value.hint


def test_each_matrix_is_encoded_once_for_a_file_in_nf4(folder, tmp_path, monkeypatch):
    source = Source.open(folder)
    encoded, encode = [], nf4.encode
    monkeypatch.setattr(nf4, "encode", lambda weight, double: encoded.append(weight.shape) or encode(weight, double))
    source.save(tmp_path / "model", source.placement(find("nf4")))
    assert len(encoded) == 3 * 7 + 1


@pytest.mark.parametrize("encoding", PACKED)
def test_any_safetensors_tool_opens_it_and_finds_the_packed_bytes(folder, tmp_path, encoding):
    path, name = tmp_path / "model", "language_model.layers.1.mlp.up_proj.weight"
    Pixtral.load(folder, quantization_encoding=encoding).save(path)
    with safe_open(path, "pt") as file:
        packed = file.get_tensor(name)
        manifest = json.loads(file.metadata()["pixtral"])
    exact = (
        Pixtral.load(folder, quantization_encoding="float32")
        .engine.model.get_submodule(name.removesuffix(".weight"))
        .weight
    )
    assert torch.equal(packed, codecs.get(encoding).encode(exact))
    assert manifest["tensors"][name] == [encoding, list(exact.shape)]


@pytest.mark.parametrize("double", [False, True])
def test_it_has_the_codes_of_nf4_as_bitsandbytes_makes_them(folder, tmp_path, double):
    path, name = tmp_path / "model", "language_model.layers.1.mlp.up_proj.weight"
    Pixtral.load(folder, quantization_encoding="nf4", double_quantization=double).save(path)
    exact = (
        Pixtral.load(folder, quantization_encoding="float32")
        .engine.model.get_submodule(name.removesuffix(".weight"))
        .weight
    )
    functional = nf4.bitsandbytes().functional
    codes, state = functional.quantize_4bit(exact.data, compress_statistics=double, quant_type="nf4")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor(name).flatten(), codes.flatten())
        assert torch.equal(file.get_tensor(f"{name}.absmax"), state.absmax)


@pytest.mark.parametrize("encoding", [*PACKED, "nf4"])
def test_a_loaded_file_is_saved_as_the_very_same_file(folder, tmp_path, encoding):
    first, second = tmp_path / "first", tmp_path / "second"
    Pixtral.load(folder, quantization_encoding=encoding).save(first)
    again = Pixtral.load(serialized_model_path=first)
    again.save(second)
    assert first.read_bytes() == second.read_bytes()
    again.source.save(second, again.placement)
    assert first.read_bytes() == second.read_bytes()


OLDER = [("q4_0", 2), ("q4_k", 2), ("nf4", 1), ("nf4", 2), ("nf4, double", 2)]


def load_as(folder, encoding):
    name, _, double = encoding.partition(", ")
    return Pixtral.load(folder, quantization_encoding=name, double_quantization=bool(double))


@pytest.mark.parametrize(("encoding", "version"), OLDER)
def test_a_file_in_an_older_order_answers_the_same_and_is_saved_as_one_of_today(folder, tmp_path, encoding, version):
    old, new, now = (tmp_path / name for name in ("old", "new", "now"))
    model = load_as(folder, encoding)
    model.save(now)
    older_files.write(old, now, version)
    with safe_open(old, "pt") as file:
        assert json.loads(file.metadata()["pixtral"])["version"] == version
        assert file.get_tensor("language_model.layers.0.mlp.up_proj.weight").ndim == 3
    again = Pixtral.load(serialized_model_path=old)
    first, second = (m.chat(QUESTION, logprobs=5, **OPTIONS) for m in (model, again))
    assert (second.token_ids, second.logprobs) == (first.token_ids, first.logprobs)
    again.save(new)
    assert new.read_bytes() == now.read_bytes()


def test_only_a_file_in_an_older_order_tells_how_to_write_it_anew(folder, tmp_path):
    now, old = tmp_path / "now", tmp_path / "old"
    Pixtral.load(folder, quantization_encoding="q4_k").save(now)
    older_files.write(old, now)
    assert Pixtral.load(serialized_model_path=now).notes == []
    (note,) = Pixtral.load(serialized_model_path=old).notes
    assert str(old) in note and f"`pixtral export {old}" in note
    assert Source.open_serialized(old, weights=False).checkpoint.note == note


@pytest.mark.parametrize("encoding", [*PACKED, "nf4", "bfloat16"])
def test_a_program_for_version_1_finds_what_it_can_read(folder, tmp_path, encoding):
    """It knows rows of every encoding, and refuses whatever has a higher version."""
    Pixtral.load(folder, quantization_encoding=encoding).save(tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as file:
        manifest = json.loads(file.metadata()["pixtral"])
        for name, (kind, shape) in manifest["tensors"].items():
            stored = list(file.get_slice(name).get_shape())
            rows = [shape[0], shape[1] // 2 if kind == "nf4" else ENCODINGS[kind].row_bytes(shape[1])] if kind in (
                *PACKED, "nf4"
            ) else shape  # fmt: skip
            assert stored == rows, name
    assert manifest["version"] == 1


def test_an_older_order_is_put_into_rows_matrix_by_matrix_and_the_files_pages_are_given_back(
    folder, tmp_path, monkeypatch
):
    now, old = tmp_path / "now", tmp_path / "old"
    Pixtral.load(folder, quantization_encoding="q4_k").save(now)
    older_files.write(old, now)
    released, release = [], serialized.SerializedFile.release
    monkeypatch.setattr(
        serialized.SerializedFile, "release", lambda self, name: released.append(name) or release(self, name)
    )
    file = serialized.SerializedFile(old)
    name = "language_model.layers.0.mlp.up_proj.weight"
    assert file.weight(name).rows.shape == (512, 144) and released == [name]
    file.weight("language_model.embed_tokens.weight")
    assert released == [name]  # it lies in rows, and stays mapped


@pytest.mark.parametrize("encoding", ["q4_0", "q4_k", "nf4"])
def test_a_file_answers_and_is_saved_the_same_where_the_compiled_kernels_are_missing(
    folder, tmp_path, monkeypatch, encoding
):
    path, again = tmp_path / "model", tmp_path / "again"
    model = Pixtral.load(folder, quantization_encoding=encoding)
    model.save(path)
    monkeypatch.setattr(native, "available", lambda: False)
    plain = Pixtral.load(serialized_model_path=path)
    layers = {n: each for n, each in plain.engine.model.named_modules() if isinstance(each, KernelLinear)}
    assert layers and all(isinstance(layer.kernel, ReferenceKernel) for layer in layers.values())
    for name, layer in layers.items():
        x = torch.randn(5, layer.weight.shape[1]).bfloat16()
        found, expected = layer(x).float(), model.engine.model.get_submodule(name)(x).float()
        assert (found - expected).norm() < 1e-2 * expected.norm()
    plain.save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("encoding", ["q4_k", "nf4"])
@pytest.mark.parametrize("fault", ["missing", "of another matrix"])
def test_codes_without_what_belongs_to_them_are_refused(folder, tmp_path, fault, encoding):
    """In a file of version 2 whose hashes and seal are right: its writer meant ill."""
    parts_of = {}

    def rob(name, parts):
        parts_of[name] = parts
        if "layers.0.mlp.up_proj" not in name:
            return parts
        beside = list(parts)[1]
        other = {beside: parts_of["language_model.layers.0.mlp.down_proj.weight"][beside][..., :-1]}
        return {"codes": parts["codes"]} | ({} if fault == "missing" else other)

    now, old = tmp_path / "now", tmp_path / "old"
    Pixtral.load(folder, quantization_encoding=encoding).save(now)
    older_files.write(old, now, change=rob)
    with pytest.raises(CheckpointCorrupt, match="up_proj"):
        Pixtral.load(serialized_model_path=old)


def test_weights_of_a_saved_model_are_mapped_and_not_copied(saved):
    layer = Pixtral.load(serialized_model_path=saved).engine.model.language_model.layers[0].mlp.up_proj
    codes = next(iter(layer.weight.tensors().values()))
    pointer, path = codes.data_ptr(), str(saved.resolve())
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(path)]
    assert any(int(low, 16) <= pointer < int(high, 16) for low, high in spans)


def test_every_altered_byte_is_noticed(saved):
    whole = saved.read_bytes()
    for place in [9, 100, *range(500, len(whole), len(whole) // 25), len(whole) - 1]:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointCorrupt):
            Pixtral.load(serialized_model_path=saved)
        with pytest.raises(CheckpointCorrupt):
            verify_path(saved)


def test_a_file_cut_short_is_refused(saved):
    whole = saved.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(CheckpointCorrupt):
            Pixtral.load(serialized_model_path=saved)


def test_hashes_are_checked_once_and_again_only_when_the_file_was_touched(saved, monkeypatch):
    reads = []
    original = serialized.SerializedFile.altered
    monkeypatch.setattr(serialized.SerializedFile, "altered", lambda file, **k: reads.append(1) or original(file, **k))
    Pixtral.load(serialized_model_path=saved)
    assert len(reads) == 0  # written here
    os.utime(saved)
    Pixtral.load(serialized_model_path=saved)
    Pixtral.load(serialized_model_path=saved)
    assert len(reads) == 1


def test_the_check_of_a_file_that_is_new_here_is_told_step_by_step_before_it_is_loaded(saved):
    os.utime(saved)
    steps = []
    Pixtral.load(serialized_model_path=saved, progress=lambda *step: steps.append(step))
    labels = [label for label, _, _ in steps]
    checked = [step for step in steps if step[0] == "Checking"]
    assert labels[: len(checked)] == ["Checking"] * len(checked) and set(labels) == {"Checking", "Loading"}
    assert len(checked) > 20 and checked[-1][1] == checked[-1][2] > saved.stat().st_size * 0.9


def test_a_newer_version_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(serialized.Manifest, "version", 99)
    model = Pixtral.load(folder)
    original = serialized.Manifest.__init__
    monkeypatch.setattr(
        serialized.Manifest, "__init__", lambda self, *a, **k: original(self, *a, **k | {"version": 99})
    )
    with pytest.raises(SerializedTooNew, match="99"):
        model.save(tmp_path / "new.pixtral")


def test_another_encoding_than_asked_for_is_refused(saved):
    with pytest.raises(PixtralError, match=r"q4_k.*q6_k"):
        Pixtral.load(serialized_model_path=saved, quantization_encoding="q6_k")
    assert Pixtral.load(serialized_model_path=saved, quantization_encoding="q4_k").encoding == "q4_k"


def test_what_is_no_serialized_model_is_refused(folder, tmp_path):
    (tmp_path / "text").write_text("hello, this is no model")
    for path in (folder / "model.safetensors", tmp_path / "text", tmp_path / "absent", tmp_path):
        with pytest.raises(WeightsError):
            Pixtral.load(serialized_model_path=path)


def test_a_full_disk_is_told_before_the_first_byte_and_leaves_nothing(folder, tmp_path, monkeypatch):
    model = Pixtral.load(folder)
    place = tmp_path / "full"
    place.mkdir()
    monkeypatch.setattr(serialized_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DiskFull):
        model.save(place / "model.pixtral")
    monkeypatch.undo()
    with pytest.raises(WriteFailed):
        model.save("/dev/full/model.pixtral")
    assert list(place.iterdir()) == []


def test_threads_that_save_to_one_path_at_once_leave_one_whole_file(folder, tmp_path):
    source, together = Source.open(folder), threading.Barrier(2, timeout=60)
    steps = [[], []]

    def save(told):
        source.save(tmp_path / "model", source.placement(None), None, lambda *step: told or wait(told, step))

    def wait(told, step):
        told.append(step)
        together.wait()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(save, steps)) == [None, None]
    assert verify_path(tmp_path / "model").manifest.encoding == "float32"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model"]


def test_a_file_taken_for_abandoned_before_it_was_locked_is_begun_anew(folder, tmp_path, monkeypatch):
    lock, taken = serialized_writer._lock, []

    def late(file, **wait):
        if not taken:
            taken.extend(tmp_path.glob(".*.partial"))
            [path.unlink() for path in taken]
        lock(file, **wait)

    monkeypatch.setattr(serialized_writer, "_lock", late)
    source = Source.open(folder)
    source.save(tmp_path / "model", source.placement(None))
    assert len(taken) == 1 and verify_path(tmp_path / "model")


def test_a_failed_save_keeps_the_file_that_was_there(folder, saved, monkeypatch):
    before = saved.read_bytes()
    model = Pixtral.load(folder, quantization_encoding="q6_k")

    def broken(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serialized_writer, "_write_header", broken)
    with pytest.raises(WriteFailed, match="No space left"):
        model.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir() if p.is_file()] == [saved.name]
