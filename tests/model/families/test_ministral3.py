"""Ministral 3 against transformers: positions that YaRN scales, and queries that grow with them, far into a text."""

import pytest
import torch
from support import builders
from support import format_builders as forms
from support.devices import CPU, loaded
from support.engines import run, tokens
from support.proposals import Forced, oracle, wrong
from support.random_requests import asked, words
from transformers import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding, get_llama_4_attn_scale

from pixtral_cli.engine.engine import Engine
from pixtral_cli.errors import ModelError
from pixtral_cli.model.attention import AttendPaged, Span
from pixtral_cli.model.config import QueryScaling, Yarn
from pixtral_cli.model.families import read_config
from pixtral_cli.model.kv_cache import PAGE, KVCache, pages_for
from pixtral_cli.model.rotary import frequencies, text_rotary

MINISTRAL = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
DEVSTRAL = {**MINISTRAL, "rope_theta": 1e8, "factor": 48.0, "original_max_position_embeddings": 8192}
MEDIUM = {
    **MINISTRAL,
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 4.0,
    "mscale_all_dim": 0.0,
    "llama_4_scaling_beta": 0,
}
PUBLISHED = {
    "Ministral 3 8B": MINISTRAL,
    "Ministral 3 14B": {**MINISTRAL, "rope_theta": 1e9},
    "Devstral Small 2": DEVSTRAL,
    "Medium 3.5": MEDIUM,
}
OTHERS = {
    "attention_factor": {**MEDIUM, "attention_factor": 0.7},
    "mscale": {**MEDIUM, "mscale": 0.5, "mscale_all_dim": 2.0},
    "factor 1": {**MEDIUM, "factor": 1.0},
    "not truncated": {**MEDIUM, "truncate": False},
    "bounds that meet": {**MEDIUM, "beta_fast": 1e-9, "beta_slow": 1e-9},
    "usual bounds": {**MEDIUM, "beta_fast": None, "beta_slow": 0},
}
FAR = [0, 1, 4095, 4096, 16383, 16384, 32767, 32768, 131071, 131072, 262143]


def text(rope, **fields):
    return read_config({"architectures": ["Ministral3ForCausalLM"], "rope_parameters": rope, **fields}).text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_rotations_and_scales_are_those_of_transformers_to_the_bit_at_every_length(name, head_dim, dtype):
    rope, positions = {**PUBLISHED, **OTHERS}[name], torch.tensor(FAR)
    expected = Ministral3RotaryEmbedding(Ministral3Config(head_dim=head_dim, rope_parameters=dict(rope)))
    cos, sin, *scales = text_rotary(positions, text(rope, head_dim=head_dim), dtype)
    for found, theirs in zip((cos, sin), expected(torch.zeros(1, dtype=dtype), positions[None]), strict=True):
        assert torch.equal(found, theirs[0, :, None])
    beta = rope["llama_4_scaling_beta"]
    assert bool(scales) == bool(beta)
    for found in scales:
        theirs = get_llama_4_attn_scale(positions[None], beta, rope["original_max_position_embeddings"]).to(dtype)
        assert torch.equal(found, theirs[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("name", "bounds", "expected", "factor"),
    [
        ("Ministral 3 8B", (20, 37), [1, 0.0133352143, 0.00132517942, 2.12388021e-05, 7.755861e-08], 1),
        ("Ministral 3 14B", (13, 25), [1, 0.0148550802, 0.00113089932, 1.90657993e-05, 8.63982642e-11], 1),
        ("Devstral Small 2", (12, 25), [1, 0.0316227766, 0.00308206303, 1.5622796e-05, 2.77816965e-10], 1),
        ("Medium 3.5", (23, 31), [1, 0.00697830585, 0.00149435364, 1.93896525e-05, 1.93896525e-08], 1.415888),
    ],
)
def test_the_published_models_turn_as_computed_by_hand(name, bounds, expected, factor):
    config = text(PUBLISHED[name])
    low, high = bounds
    found = frequencies(128, config.rope_theta, CPU, config.yarn)[[0, low, (low + high) // 2, high, 63]]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert config.yarn.attention_factor == pytest.approx(factor, abs=1e-6)


def test_queries_grow_with_the_logarithm_of_their_position():
    positions = torch.tensor([0, 16383, 16384, 32768, 131072, 262143])
    _, _, scales = text_rotary(positions, text(MINISTRAL), torch.float32)
    wanted = [1, 1, 1.069314718, 1.109861229, 1.219722458, 1.277258872]
    assert scales.shape == (6, 1, 1) and scales.flatten().tolist() == pytest.approx(wanted, abs=1e-7)


def test_a_short_text_has_no_scales_to_multiply_with():
    assert len(text_rotary(torch.arange(16384), text(MINISTRAL), torch.float32)) == 2


# --- the config


def test_old_and_new_spellings_are_the_same():
    old = {key: value for key, value in MINISTRAL.items() if key not in ("rope_type", "rope_theta")}
    found = text(None, rope_theta=1e6, rope_scaling=old)
    assert found == text(MINISTRAL)
    assert found.yarn == Yarn(16.0, 16384, 32.0, 1.0, 1.0)
    assert found.query_scaling == QueryScaling(0.1, 16384)


@pytest.mark.parametrize("absent", [{}, {"rope_parameters": None}])
def test_absent_fields_mean_the_defaults_of_transformers(absent):
    found, theirs = read_config({"model_type": "ministral3", **absent}).text, Ministral3Config()
    assert (found.vocab_size, found.num_layers, found.head_dim) == (131072, theirs.num_hidden_layers, theirs.head_dim)
    assert (found.max_length, found.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert set(found.sliding_windows) == {None} and not found.tied_embeddings
    assert (found.rope_theta, found.yarn, found.query_scaling) == (
        1e6, Yarn(16.0, 16384, 32.0, 1.0, 1.0), QueryScaling(0.1, 16384),
    )  # fmt: skip


@pytest.mark.parametrize("beta", [None, 0, 0.0])
def test_without_a_beta_queries_stay_as_they_are(beta):
    assert text({**MINISTRAL, "llama_4_scaling_beta": beta}).query_scaling is None


def test_plain_mistral_turns_by_yarn_too_and_its_queries_stay():
    found = read_config({"model_type": "mistral", "rope_parameters": MINISTRAL}).text
    assert found.yarn == text(MINISTRAL).yarn and found.query_scaling is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", None),
        ("factor", "16"),
        ("original_max_position_embeddings", 0),
        ("beta_fast", "fast"),
        ("mscale", -1),
        ("attention_factor", 0),
        ("llama_4_scaling_beta", "0.1"),
        ("truncate", 1),
        ("partial_rotary_factor", 0.5),
        ("rope_theta", 1),
        ("rope_type", "longrope"),
    ],
)
def test_a_field_of_scaled_positions_that_is_wrong_is_named(key, value):
    with pytest.raises(ModelError, match=str(value) if key == "rope_type" else key):
        text({**MINISTRAL, key: value})


# --- the model


@torch.inference_mode()
def our_logits(model, ids, first=0):
    """Of a text whose first token has the position `first`."""
    pages = list(range(pages_for(len(ids))))
    cache = KVCache(model.config.text, model.dtype, model.device, len(pages))
    attend = AttendPaged(model.config.text, cache, [Span(pages, 0, len(ids))], model.device)
    return model.logits(model(model.embed(torch.tensor(ids)), torch.arange(first, first + len(ids)), attend))


@torch.no_grad()
def hf_logits(hf, ids, first=0):
    return hf(torch.tensor([ids]), position_ids=torch.arange(first, first + len(ids))[None]).logits[0].float()


LONG = {"max_position_embeddings": 262144, "head_dim": 32}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """A small model with the positions of a published one: its folder and transformers' model."""
    folder = tmp_path_factory.mktemp("published")
    return folder, builders.ministral3(folder, PUBLISHED[request.param], **LONG)


@pytest.mark.parametrize("first", [0, 16383 - 20, 32768 - 20, 131072 - 20, 262144 - 41])
def test_logits_equal_far_into_a_text(published, first):
    folder, hf = published
    ids = words(1, 41)
    expected = hf_logits(hf, ids, first)
    torch.testing.assert_close(
        our_logits(loaded(folder), ids, first).log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0
    )


def test_what_a_far_token_sees_depends_on_the_scale_of_its_query(published):
    """The test above could not fail if scales made no visible difference."""
    folder, hf = published
    ids = words(1, 41)
    near, far = (our_logits(loaded(folder), ids, first) for first in (0, 131072))
    moved = (near - far).abs().max()
    assert moved > 0.01 if hf.config.rope_parameters["llama_4_scaling_beta"] else moved < 0.05


def test_bfloat16_agrees_with_transformers_in_bfloat16_far_into_a_text(published):
    folder, hf = published
    ids, first = words(1, 41), 131072
    exact = hf_logits(hf, ids, first)
    ours = our_logits(loaded(folder, encoding="bfloat16"), ids, first)
    half = hf_logits(type(hf).from_pretrained(folder, dtype=torch.bfloat16), ids, first)
    assert (ours - exact).abs().mean() < 1.5 * (half - exact).abs().mean()


def test_a_text_that_grows_past_16384_tokens_gets_the_tokens_of_transformers(tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    hf = builders.ministral3(tmp_path, MINISTRAL, max_position_embeddings=262144, **sizes)
    prompt = asked(words(1, 16370), tokens=24)
    hf.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = hf.generate(torch.tensor([prompt.token_ids]), max_new_tokens=24, do_sample=False)
    [events] = run(Engine(loaded(tmp_path), max_length=16400), prompt)
    assert tokens(events) == expected[0, 16370:].tolist()


# --- its three forms


@pytest.mark.parametrize("rope", [builders.YARN, builders.DEVSTRAL2, {**builders.DEVSTRAL2, "mscale_all_dim": 1.0}])
@pytest.mark.parametrize("tied", [True, False])
def test_every_form_has_the_logits_of_transformers(tmp_path, rope, tied):
    hf = builders.ministral3(tmp_path / "hf", rope, tie_word_embeddings=tied)
    forms.native(tmp_path / "hf", tmp_path / "native", tied_embeddings=tied)
    forms.gguf_text(tmp_path / "hf", tmp_path / "model.gguf")
    ids = words(2, 70)
    expected = hf_logits(hf, ids)
    for form in ("hf", "native", "model.gguf"):
        model = loaded(tmp_path / form)
        assert model.config.architecture == "Ministral3ForCausalLM" and model.config.text.tied_embeddings == tied
        torch.testing.assert_close(our_logits(model, ids), expected, atol=1e-4, rtol=0)
    builders.edit_config(tmp_path / "hf", _spelt_as_before)
    torch.testing.assert_close(our_logits(loaded(tmp_path / "hf"), ids), expected, atol=1e-4, rtol=0)


def _spelt_as_before(config):
    rope = config.pop("rope_parameters")
    config.update(rope_theta=rope.pop("rope_theta"), rope_scaling={"type": rope.pop("rope_type"), **rope})


# --- however its tokens are computed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its queries grow after 16 tokens, and every 16 tokens more."""
    folder = tmp_path_factory.mktemp("ministral3")
    builders.ministral3(folder)
    return loaded(folder)


MANY = [asked(words(seed, 9 + 60 * seed), tokens=24) for seed in range(6)]


def plain(model, request):
    return tokens(run(Engine(model, speculative=False), request)[0])


def test_together_requests_get_the_tokens_of_each_alone(model):
    engine = Engine(model, max_batch_size=4, speculative=False)
    assert [tokens(events) for events in run(engine, *MANY)] == [plain(model, request) for request in MANY]


@pytest.mark.parametrize("guess", [oracle, wrong])
def test_proposals_change_nothing(model, guess):
    expected = [plain(model, request) for request in MANY]
    engine = Engine(model, max_batch_size=3)
    Forced(engine, guess(expected))
    assert [tokens(events) for events in run(engine, *MANY)] == expected
    assert engine.counters.proposed_tokens > 0


@pytest.mark.parametrize("chunk", [PAGE, 5 * PAGE])
def test_a_prompt_in_chunks_gets_the_tokens_of_a_whole_one(model, chunk):
    expected = [plain(model, request) for request in MANY]
    engine = Engine(model, max_batch_size=2, speculative=False)
    engine.scheduler.exact, engine.scheduler.chunks = False, (chunk, PAGE)
    assert [tokens(events) for events in run(engine, *MANY)] == expected


def test_a_prompt_whose_beginning_is_known_gets_the_tokens_of_a_new_one(model):
    first, second = (asked(words(1, 20 * PAGE), words(seed, 9), tokens=24) for seed in (2, 3))
    engine = Engine(model, speculative=False)
    engine.scheduler.exact = engine.runner.exact = False
    run(engine, first)
    [events] = run(engine, second)
    assert events[0].cached_tokens == 20 * PAGE and tokens(events) == plain(model, second)
