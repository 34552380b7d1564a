"""The plan of a card's memory: every part counted by itself, and nothing promised that does not fit."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import builders
from support.devices import loaded
from support.engines import run
from support.live_bytes import LiveBytes

from pixtral_cli.bench.random_weights import RandomCheckpoint
from pixtral_cli.bench.shapes import config_of
from pixtral_cli.encoding_choices import find
from pixtral_cli.engine import sampler
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Request, Sampling
from pixtral_cli.errors import ModelError
from pixtral_cli.model import free_memory, language_model, layers, memory, vision
from pixtral_cli.model import load as loading
from pixtral_cli.model.config import ModelConfig, TextConfig, VisionConfig
from pixtral_cli.model.families import read_config
from pixtral_cli.model.load import load
from pixtral_cli.model.memory import GIB, Plan, Work
from pixtral_cli.model.placement import place
from weights_cache import checkpoint
from weights_cache.formats.reader import TensorInfo

CPU, CARD = torch.device("cpu"), torch.device("cuda")
NEMO = TextConfig(131072, 5120, 14336, 40, 32, 8, 128, 1e-5, 1e6, 131072, (None,) * 40, tied_embeddings=False)
TOWER = VisionConfig(1024, 4096, 24, 16, 64, 3, 16, 1e4, 24)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model's tensors and sizes."""
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder)
    opened = checkpoint.open(folder)
    return opened.tensors, read_config(opened.config)


def plan_of(small, encoding="bfloat16", kind="gpu", **work):
    tensors, config = small
    return memory.plan(tensors, place(tensors, find(encoding)), config, kind, Work(**work))


@pytest.mark.parametrize(("kept", "bytes_of_a_head"), [("float32", 512), ("bfloat16", 256), ("fp8", 129)])
def test_a_token_of_a_12_b_model_takes_so_many_bytes_of_keys_and_values(kept, bytes_of_a_head):
    assert memory.kv_bytes(NEMO, 3, kept) == 3 * 2 * 40 * 8 * bytes_of_a_head


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_bound_on_keys_and_values_holds_twice_the_tokens_in_fp8(small, monkeypatch, kind):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * GIB)
    wide, narrow = (plan_of(small, kind=kind, kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    tokens = [memory.kv_tokens(plan, CPU if kind == "cpu" else CARD, 10**6, 2**20) for plan in (wide, narrow)]
    head = small[1].text.head_dim
    assert tokens[1] == pytest.approx(tokens[0] * 2 * head / (head + 1), rel=1e-3)


def test_the_largest_pass_of_a_12_b_model_is_its_feed_forward_layers():
    """A prefill of 8,192 tokens: gate, up, their product, six vectors and the angles of each, in bfloat16."""
    alone = memory.pass_bytes(ModelConfig("m", NEMO), 2, Work())
    assert alone == 8192 * 2 * (3 * 14336 + 6 * 5120 + 3 * 128)
    assert memory.pass_bytes(ModelConfig("m", NEMO), 4, Work()) == 2 * alone


@pytest.fixture
def as_on_a_card(monkeypatch, tmp_path):
    """A bfloat16 model with joined matrices, and operations that make what their forms for a card make."""
    builders.pixtral(tmp_path, hidden_size=256, intermediate_size=700)
    opened = checkpoint.open(tmp_path)
    config = read_config(opened.config)
    monkeypatch.setattr(loading, "_fill", loading._fill_card)
    model = load(opened, config, place(opened.tensors, find("bfloat16")), CPU)
    forms = {
        "add_norm": lambda x, delta, norm: (x if delta is None else x + delta, torch.empty_like(x)),
        "rotate": lambda q, k, cos, sin: (q, k),
        "silu_mul": lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2),
    }
    for module, (name, form) in itertools.product((layers, language_model, vision), forms.items()):
        monkeypatch.setattr(module, name, form, raising=False)
    monkeypatch.setattr(vision, "attend_within_images", lambda *_: lambda layer, q, k, v: torch.empty_like(q))
    return model


@torch.inference_mode()
def test_the_numbers_that_the_plan_counts_for_a_token_are_those_that_live_at_one_time(as_on_a_card):
    tokens, text = torch.randint(320, (512,)), as_on_a_card.config.text
    with LiveBytes() as live:
        as_on_a_card(as_on_a_card.embed(tokens), torch.arange(512), lambda layer, q, k, v: torch.empty_like(q))
    assert live.most == pytest.approx(2 * 512 * memory._numbers(text), rel=0.02)


@torch.inference_mode()
def test_the_numbers_that_the_plan_counts_for_a_patch_are_those_that_live_at_one_time(as_on_a_card):
    pixels, config = torch.rand(3, 512, 512), as_on_a_card.config
    with LiveBytes() as live:
        as_on_a_card.encode_images([pixels])
    assert live.most == pytest.approx(2 * 1024 * memory._numbers_of_a_patch(config.vision, config.text), rel=0.1)


@torch.inference_mode()
def test_a_cpu_has_room_for_the_largest_picture_of_a_model(tmp_path):
    builders.mistral3(tmp_path, hidden_size=256)
    model = loaded(tmp_path)
    config = replace(model.config, image_layout=replace(model.config.image_layout, longest_side=28 * 30))
    pixels = torch.rand(3, 28 * 30, 28 * 30)
    with LiveBytes() as live:
        model.encode_images([pixels])
    assert live.most == pytest.approx(memory.cpu_image_bytes(config, 4), rel=0.15)


def test_pictures_that_need_more_than_the_workspace_of_a_cpu_are_planned_for():
    small, large = (config_of(shape, sees=True) for shape in ("nemo-12b", "small-24b"))
    passes = []
    for raw in (small, large):
        tensors = RandomCheckpoint(raw, config := read_config(raw), "q4_k").tensors
        placed = place(tensors, find("float32"))
        passes.append(memory.plan(tensors, placed, config, "cpu", Work()).passes)
    patch = 3 * 14 * 14 + 10 * 1024 + 3 * 64
    assert passes == [memory.WORKSPACE, 110 * 110 * 4 * patch]


def test_a_tower_that_needs_more_than_the_decoder_decides():
    small_decoder = TextConfig(1000, 256, 512, 2, 4, 2, 64, 1e-5, 1e6, 4096, (None, None), tied_embeddings=False)
    seeing, blind = (ModelConfig("m", small_decoder, tower) for tower in (TOWER, None))
    patch = 3 * 4096 + 6 * 1024 + 3 * 64 + 3 * 16 * 16
    assert memory.pass_bytes(seeing, 2, Work()) == memory.PATCHES * 2 * patch > memory.pass_bytes(blind, 2, Work())


def test_of_many_sequences_the_logits_count_once_they_are_larger():
    config = ModelConfig("m", NEMO)
    few, many = (memory.pass_bytes(config, 2, Work(batch=batch)) for batch in (16, 512))
    assert few == memory.pass_bytes(config, 2, Work()) and many > 512 * 131072 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "top_p": 0.9},
        {"top_k": 50, "min_p": 0.05},
        {"repetition_penalty": 1.1, "logit_bias": {1: 2.0}},
    ],
)
def test_sampling_takes_no_more_than_the_plan_counts_for_a_logit(options):
    every = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05} | options
    row = sampler.Row(Sampling(**every), [1, 2, 3], 2, torch.Generator(), logprobs=5)
    with LiveBytes() as live:
        sampler.sample(torch.randn(8, 4096), [row] * 8)
    assert live.most <= 8 * 4096 * (memory.LOGIT_BYTES - memory.SORTING)


def test_a_context_shorter_than_a_prefill_bounds_it():
    config = ModelConfig("m", NEMO)
    half, whole = (memory.pass_bytes(config, 2, Work(batch, 1024)) for batch in (4, 100))
    assert whole == memory.pass_bytes(config, 2, Work()) == 2 * half


def tensors_of(**shapes):
    """Tensors that a file holds in float32, by the last word of their names."""
    named = {f"language_model.layers.0.mlp.{name}.weight": shape for name, shape in shapes.items()}
    if "embed_tokens" in shapes:
        named["language_model.embed_tokens.weight"] = named.pop("language_model.layers.0.mlp.embed_tokens.weight")
    return {name: TensorInfo(name, "F32", shape, 0, Path("file"), "float32") for name, shape in named.items()}


def beside(encoding, **shapes):
    tensors = tensors_of(**shapes)
    return memory.card_kernel_bytes(tensors, place(tensors, find(encoding)))


def test_packed_weights_take_on_a_card_what_its_kernel_makes_of_them_and_the_buffer_that_they_are_decoded_into():
    """A block of 16 x 256 weights in q4_k: 2,304 bytes in a file, 2,368 on a card."""
    shape = (4096, 5120)
    assert beside("q4_k", up_proj=shape) == 256 * 2**20 + 4096 * 5120 // 4096 * (2368 - 2304)
    assert beside("q4_0", up_proj=shape) == 256 * 2**20
    assert beside("bfloat16", up_proj=shape) == 0
    assert beside("q4_0", up_proj=(4096, 96)) == 0  # no rows for that kernel


def test_a_packed_table_is_on_a_card_once_in_the_order_of_its_kernel():
    rows, columns = 1024, 512
    assert beside("q4_k", embed_tokens=(rows, columns)) == 256 * 2**20 + rows * columns // 4096 * (2368 - 2304)


def test_a_card_leaves_room_for_others_and_for_its_own_libraries(small):
    free, batch = 16 * GIB, 16
    plan = plan_of(small, batch=batch, image_cache=2**29)
    tokens = plan.room(free)
    taken = plan.beside + tokens * plan.token
    assert free - taken >= max(256 * 2**20, 0.03 * free) and free - taken - plan.token < 0.031 * free
    assert plan.images == 2**29 and plan.libraries > 0 and plan.graphs > 0
    assert plan.fits(free + plan.context, tokens - 2**16) and not plan.fits(free, tokens)


def test_weights_that_are_loaded_are_not_counted_twice(small):
    plan, free = plan_of(small), 8 * GIB
    before, after = plan.room(free), plan.room(free - plan.weights - plan.kernels, loaded=True)
    assert after == pytest.approx(before, rel=0.01)


def test_what_torch_takes_is_planned_without_what_cuda_takes_beside_it(small):
    plan = plan_of(small, batch=4)
    assert plan.total(1000) - plan.taken(1000) == plan.context + plan.libraries
    assert plan.taken(2000) - plan.taken(1000) == 1000 * plan.token


def test_a_cpu_is_planned_as_before(small):
    plan = plan_of(small, kind="cpu", batch=16, image_cache=2**29)
    assert plan.beside == plan.weights + plan.kernels + memory.WORKSPACE
    assert plan.room(plan.beside + 1000 * plan.token) == 900 and plan.margin(10**12) == 0


def test_on_a_card_a_bound_above_what_is_free_is_lowered_to_it(small, monkeypatch):
    plan = plan_of(small)
    free = plan.beside + memory.MARGIN + 1000 * plan.token
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert memory.kv_tokens(plan, CARD, 10**6, 2**40) == memory.kv_tokens(plan, CARD, 10**6) == 1000
    assert memory.kv_tokens(plan, CARD, 10**6, 300 * plan.token) == 300
    monkeypatch.setattr(memory, "free_bytes", lambda device: free - 900 * plan.token)
    with pytest.raises(ModelError, match="keys and values: 100 tokens"):
        memory.kv_tokens(plan, CARD, 10**6, 2**40)


def test_weights_that_leave_no_room_to_compute_are_refused_before_they_are_loaded(small, monkeypatch):
    tensors, config = small
    plan = plan_of(small, "float32")
    monkeypatch.setattr(memory, "free_bytes", lambda device: plan.weights + 2**20)
    with pytest.raises(ModelError, match=r"needs \d+\.\d GiB of memory, and gpu-0 has") as refused:
        memory.check_weights(tensors, place(tensors, find("float32")), config, CARD, Work())
    assert "--devices cpu" in refused.value.hint


def test_graphs_for_several_numbers_of_sequences_share_the_memory_of_the_largest():
    one, odd, many = (memory.graph_bytes(NEMO, 2, batch) for batch in (1, 5, 1000))
    rows = 2 * (3 * 14336 + 6 * 5120 + 3 * 128) + 10 * 131072
    assert one == memory.GRAPH + rows and odd == 4 * memory.GRAPH + 5 * rows  # for 1, 2, 4 and 5 sequences
    assert many == 18 * memory.GRAPH + 1000 * rows
    assert math.isclose(Plan(1, 2, 3, 4).total(5), 1 + 2 + 3 + 20)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_what_is_taken_of_a_card_is_within_a_tenth_of_what_was_planned(tmp_path, kv_cache_dtype):
    """Half of it are weights and the cache, half of it passes and graphs."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 8192}
    builders.mistral(tmp_path, **sizes, head_dim=128, max_position_embeddings=2 * memory.PREFILL)
    opened, work = checkpoint.open(tmp_path), Work(16, 2 * memory.PREFILL, kv_cache_dtype=kv_cache_dtype)
    config, placement, card = read_config(opened.config), place(opened.tensors, find("bfloat16")), torch.device("cuda")
    plan = memory.check_weights(opened.tensors, placement, config, card, work)
    tokens = memory.kv_tokens(plan, card, 10**6, 2**28)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(card)
    torch.cuda.reset_peak_memory_stats(card)
    model = load(opened, config, placement, card)
    engine = Engine(model, work.context, work.batch, kv_tokens=tokens, kv_cache_dtype=kv_cache_dtype)
    engine.warm_up()
    prompt = tuple(number % 8000 for number in range(memory.PREFILL - 1))
    few = [prompt[at : at + 100] for at in range(work.batch)]
    for requests in ([prompt], few):
        run(engine, *(Request(each, max_new_tokens=4) for each in requests))
    taken = free_memory.taken_bytes(card) - before
    assert taken == pytest.approx(plan.taken(tokens), rel=0.1)
