"""Matrices that are joined for a card give what they give apart, and are saved as they were."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import builders
from torch import nn

from pixtral_cli.encoding_choices import asked_for, find
from pixtral_cli.model import joining, save
from pixtral_cli.model import load as loading
from pixtral_cli.model.families import read_config
from pixtral_cli.model.kernels import nf4
from pixtral_cli.model.load import load
from pixtral_cli.model.placement import place
from weights_cache import checkpoint, codecs, packed
from weights_cache.codecs import fp8
from weights_cache.codecs.fp8 import FP8
from weights_cache.packed import PackedRows

CPU = torch.device("cpu")
ROWS, COLUMNS = (64, 32, 32), 256
NAMES = [f"layers.0.self_attn.{part}.weight" for part in joining.JOINED["qkv_proj"]]
ENCODINGS = ["float32", "bfloat16", "q4_0", "q4_k", "q6_k", "q8_0", "fp8", "nf4"]


def encoded(encoding, rows, columns=COLUMNS):
    weight = torch.randn(rows, columns)
    if encoding in loading.DTYPES:
        return weight.to(loading.DTYPES[encoding])
    if encoding == "fp8":
        return fp8.encode(weight)
    if encoding.startswith("nf4"):
        return nf4.encode(weight, double=encoding == "nf4, twice")
    return PackedRows(encoding, codecs.get(encoding).encode(weight))


def same(one, other):
    one, other = ({"": each} if isinstance(each, torch.Tensor) else each.tensors() for each in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_rows_of_a_joined_matrix_are_those_of_its_parts(encoding):
    parts = [encoded(encoding, rows) for rows in ROWS]
    whole = packed.joined(parts)
    assert whole.shape == (sum(ROWS), COLUMNS)
    assert torch.equal(packed.plain(whole), torch.cat([packed.plain(part) for part in parts]))
    assert same(packed.rows_of(whole, 64, 96), parts[1])


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [encoded("q4_k", 64), encoded("q6_k", 64)],
        lambda: [encoded("q4_k", 64), encoded("bfloat16", 64)],
        lambda: [encoded("bfloat16", 64), encoded("float32", 64)],
        lambda: [encoded("q4_k", 64), encoded("nf4", 64)],
        lambda: [encoded("q4_k", 64), encoded("fp8", 64)],
        lambda: [encoded("fp8", 64), FP8(encoded("fp8", 64).codes, torch.ones(64, 2))],
        lambda: [nf4.encode(torch.randn(64, 256), double=True) for _ in range(2)],
        lambda: [nf4.encode(torch.randn(3, 32)) for _ in range(2)],  # the last block of each is cut off
    ],
)
def test_what_cannot_be_one_matrix_stays_apart(parts):
    assert packed.joined(parts()) is None


def test_names_are_grouped_by_the_matrix_that_they_are_joined_in_and_none_is_lost(tmp_path):
    builders.pixtral(tmp_path)
    opened = checkpoint.open(tmp_path)
    names = loading.check_names(loading.empty(read_config(opened.config)), opened)
    grouped = list(joining.groups(names))
    assert sorted(name for group in grouped for name in group) == sorted(names)
    joined = [group for group in grouped if len(group) > 1]
    assert len(joined) == 2 * (3 + 3)  # two matrices a layer, three layers each of decoder and tower
    for group in joined:
        parts = tuple(name.split(".")[-2] for name in group)
        assert parts in joining.JOINED.values() and len({name.rsplit(".", 2)[0] for name in group}) == 1


@pytest.mark.parametrize("encoding", [*ENCODINGS, "nf4, twice"])
def test_a_joined_product_is_that_of_its_parts_side_by_side(encoding):
    dtype = torch.float32 if encoding == "float32" else torch.bfloat16
    weights, x = [encoded(encoding, rows) for rows in ROWS], torch.randn(5, COLUMNS).to(dtype)
    parts = joining.JOINED["qkv_proj"]
    block = nn.ModuleDict({part: nn.Linear(COLUMNS, rows) for part, rows in zip(parts, ROWS, strict=True)})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": block})])})
    assert joining.join(model, NAMES, weights, dtype)
    together = block.qkv_proj(x)
    apart = torch.cat([x.float() @ packed.plain(weight).float().T for weight in weights], 1)
    assert together.shape == (5, sum(ROWS))
    torch.testing.assert_close(together.float(), apart, rtol=2e-2, atol=0.2 if dtype == torch.bfloat16 else 1e-4)
    assert all(same(block[part].weight, weight) for part, weight in zip(parts, weights, strict=True))


def wanted(encoding):
    return asked_for(encoding.split(",")[0], double_quantization=encoding == "nf4, twice")


def as_on_a_card(monkeypatch, folder, encoding):
    """The model of `folder` loaded in the way of a card and in a CPU's, both on the CPU, and what they are made of."""
    opened = checkpoint.open(folder)
    config = read_config(opened.config)
    placement = place(opened.tensors, wanted(encoding), quantize_vision=wanted(encoding).packed)
    usual = load(opened, config, placement, CPU)
    monkeypatch.setattr(loading, "_fill", loading._fill_card)
    return usual, load(opened, config, placement, CPU), opened


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "q4_0", "q4_k", "q6_k", "fp8", "nf4", "nf4, twice"])
def test_a_model_loaded_as_on_a_card_has_the_weights_of_one_that_is_not(monkeypatch, tmp_path, encoding):
    builders.pixtral(tmp_path, hidden_size=256, intermediate_size=256)
    usual, joined, opened = as_on_a_card(monkeypatch, tmp_path, encoding)
    attention, tower = joined.language_model.layers[0].self_attn, joined.vision_tower.layers[2]
    assert attention.qkv_proj.weight.shape == (8 * 16 + 2 * 2 * 16, 256)
    assert tower.feed_forward.gate_up_proj.weight.shape == (2 * 96, 64)
    for name in opened.tensors:
        one, other = save.loaded(usual, name), save.loaded(joined, name)
        assert same(one, other), name


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "q4_k"])
def test_a_model_loaded_as_on_a_card_computes_what_one_does_that_is_not(monkeypatch, tmp_path, encoding):
    builders.pixtral(tmp_path, hidden_size=256, intermediate_size=256)
    usual, joined, _ = as_on_a_card(monkeypatch, tmp_path, encoding)
    assert isinstance(joined.language_model.layers[1].mlp.up_proj, joining.PartOf)
    close = {"rtol": 1e-4, "atol": 1e-4} if encoding == "float32" else {"rtol": 5e-2, "atol": 5e-2}
    tokens, positions = torch.randint(320, (6,)), torch.arange(6)

    def mixed(layer, q, k, v):
        return q * k.repeat_interleave(4, 1) + v.repeat_interleave(4, 1)  # each of them counts

    one, other = (model(model.embed(tokens), positions, mixed) for model in (usual, joined))
    torch.testing.assert_close(one.float(), other.float(), **close)
    pixels = torch.rand(3, 32, 48)
    one, other = (model.encode_image(pixels) for model in (usual, joined))
    torch.testing.assert_close(one.float(), other.float(), **close)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "q4_0", "q4_k", "q6_k", "fp8", "nf4", "nf4, twice"])
def test_a_model_on_a_card_is_saved_as_one_on_a_cpu(tmp_path, encoding):
    builders.pixtral(tmp_path, hidden_size=256, intermediate_size=256)
    opened = checkpoint.open(tmp_path)
    config, placement = read_config(opened.config), place(opened.tensors, wanted(encoding))
    usual, there = (load(opened, config, placement, torch.device(name)) for name in ("cpu", "cuda"))
    assert there.language_model.layers[0].self_attn.qkv_proj.weight.shape == (8 * 16 + 2 * 2 * 16, 256)
    for name in opened.tensors:
        one, other = save.loaded(usual, name), save.loaded(there, name)
        assert same(one, other), name


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64])
def test_floats_are_cast_on_a_card_as_on_a_cpu(tmp_path, stored):
    builders.mistral(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    opened = checkpoint.open(tmp_path)
    config, placement = read_config(opened.config), place(opened.tensors, find("bfloat16"))
    usual, there = (load(opened, config, placement, torch.device(name)) for name in ("cpu", "cuda"))
    assert all(torch.equal(save.loaded(usual, name), save.loaded(there, name)) for name in opened.tensors)
