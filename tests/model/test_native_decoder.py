"""A pass through all layers in one call gives the bits that the layers give, one after the other."""

import pytest
import torch
from support import builders
from support.devices import CPU, loaded
from support.native_paths import compiled, path, threads  # noqa: F401

from pixtral_cli.model.attention import AttendPaged, Span
from pixtral_cli.model.kv_cache import KVCache

pytestmark = compiled
PAGES = {"short": [5], "long": [3, 0, 7], "elsewhere": [2, 6]}
LENGTHS = {"short": 3, "long": 40, "elsewhere": 17}


@pytest.fixture(scope="module", params=["nemo", "ministral", "tied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", ""))
    builders.TEXT_FAMILIES[request.param](folder)
    return folder


def passed(model, spans, rows, kv_cache_dtype="auto"):
    """Hidden states of `rows` rows whose tokens are those of `spans`, and the keys and values after the pass."""
    torch.manual_seed(1)
    config = model.config.text
    store = KVCache(config, model.dtype, CPU, pages=8, kv_cache_dtype=kv_cache_dtype)
    for layer in range(config.num_layers):
        for side in store.layer(layer)[:2]:
            side.copy_(torch.randn(side.shape) if side.is_floating_point() else torch.zeros(side.shape))
    x = torch.randn(rows, config.hidden_size).to(model.dtype)
    positions = torch.tensor([t for span in spans for t in range(span.before, span.before + span.tokens)])
    positions = torch.cat([positions, positions.new_zeros(rows - len(positions))])
    with torch.inference_mode():
        given = x.clone()
        hidden = model(x, positions, AttendPaged(config, store, spans, CPU))
    assert torch.equal(x, given)
    return hidden, [side for layer in range(config.num_layers) for side in store.layer(layer)[:2]]


def counted(monkeypatch, model):
    """What the one call gave, pass by pass: None where it took none."""
    native, found = model.language_model.native, []

    def call(*args):
        found.append(native(*args))
        return found[-1]

    monkeypatch.setattr(model.language_model, "native", call)
    return found


def one_each(*names):
    return [Span(PAGES[name], LENGTHS[name] - 1, 1) for name in names]


@pytest.mark.parametrize("encoding", ["bfloat16", "float32", "q8_0"])
@pytest.mark.parametrize(
    ("names", "rows"), [(["long"], 1), (["short", "long", "elsewhere"], 3), (["long", "short"], 8)]
)
def test_the_bits_are_those_of_the_layers(folder, monkeypatch, path, threads, encoding, names, rows):  # noqa: F811
    model = loaded(folder, encoding=encoding)
    calls = counted(monkeypatch, model)
    hidden, stored = passed(model, one_each(*names), rows)
    assert len(calls) == 1 and calls[0] is not None
    monkeypatch.setattr(model.language_model, "native", None)
    expected, expected_stored = passed(model, one_each(*names), rows)
    assert torch.equal(hidden, expected)
    assert all(torch.equal(*each) for each in zip(stored, expected_stored, strict=True))


def test_tokens_that_follow_each_other_see_those_before_them(folder, monkeypatch):
    """As proposals do, which are spans of one token in the same pages."""
    model = loaded(folder, encoding="bfloat16")
    calls = counted(monkeypatch, model)
    spans = [Span(PAGES["long"], 36 + n, 1) for n in range(4)]
    hidden, _ = passed(model, spans, 4)
    assert calls[0] is not None
    monkeypatch.setattr(model.language_model, "native", None)
    assert torch.equal(hidden, passed(model, spans, 4)[0])


@pytest.mark.parametrize(
    ("spans", "rows", "dtype"),
    [
        ([Span(PAGES["long"], 8, 3)], 3, "auto"),
        ([Span(PAGES["long"], 8, 3), *one_each("short")], 4, "auto"),
        (one_each("long"), 32, "auto"),
        (one_each("long"), 1, "fp8"),
    ],
    ids=["prompt", "prompt beside another", "many rows", "8-bit keys"],
)
def test_other_passes_go_layer_by_layer(folder, monkeypatch, spans, rows, dtype):
    model = loaded(folder, encoding="bfloat16")
    calls = counted(monkeypatch, model)
    passed(model, spans, rows, dtype)
    assert calls == [None]


def test_queries_that_grow_with_their_position_are_left_to_the_layers(tmp_path, monkeypatch):
    builders.ministral3(tmp_path)  # from position 16 on
    model = loaded(tmp_path, encoding="bfloat16")
    calls = counted(monkeypatch, model)
    passed(model, one_each("short"), 1)
    passed(model, one_each("long"), 1)
    assert calls[0] is not None and calls[1] is None
