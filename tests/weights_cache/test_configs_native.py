"""Promises of Mistral's own form: params.json, consolidated weights, names and the order of rotary rows.

Expected configs and names are spelled out here; that the whole model then answers alike is in tests/test_formats.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weights_cache import checkpoint, configs, names
from weights_cache.errors import CheckpointCorrupt, ModelUnsupported, PickleRefused, WeightsError, WeightsNotFound

PIXTRAL = {
    "dim": 5120,
    "n_layers": 40,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "rope_theta": 1000000000.0,
    "norm_eps": 1e-05,
    "vocab_size": 131072,
    "vision_encoder": {
        "hidden_size": 1024,
        "num_channels": 3,
        "image_size": 1024,
        "patch_size": 16,
        "rope_theta": 10000.0,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_token_id": 10,
    },
}
"""The sizes of Pixtral-12B, without `adapter_bias`: absent, it is true (mistral-inference `args.py`)."""


@pytest.fixture
def read(tmp_path: Path):
    """Reads params.json made of PIXTRAL and changes; None removes a key."""

    def read(vision: dict | None = None, **changes: object) -> dict:
        params = {**PIXTRAL, **changes}
        if vision is not None:
            params["vision_encoder"] = {**PIXTRAL["vision_encoder"], **vision}
        path = tmp_path / "params.json"
        path.write_text(json.dumps({key: value for key, value in params.items() if value is not None}))
        return configs.from_native(path, json.loads(path.read_text()))

    return read


def test_pixtrals_params_become_the_config_of_hugging_face(read):
    config = read()
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["image_token_index"], config["multimodal_projector_bias"]) == (10, True)
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")
    assert config["text_config"] == {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "max_position_embeddings": 128000,
        "sliding_window": None,
    }
    assert config["vision_config"] == {
        "model_type": "pixtral",
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 1024,
        "patch_size": 16,
        "rope_theta": 10000.0,
    }


def test_a_text_model_has_a_text_models_config(read):
    config = read(vision_encoder=None, tied_embeddings=True, max_seq_len=32768)
    assert config["architectures"] == ["MistralForCausalLM"] and "vision_config" not in config
    assert (config["tie_word_embeddings"], config["max_position_embeddings"]) == (True, 32768)


@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
@pytest.mark.parametrize("window", [4096, "4096", [None, 32768, 32768, 32768]])
def test_sliding_windows_are_a_number_or_a_list(read, key, window):
    expected = 4096 if window == "4096" else window
    assert read(**{key: window})["text_config"]["sliding_window"] == expected


def test_what_is_absent_has_the_references_default(read):
    text = read(rope_theta=None, head_dim=None, n_kv_heads=None)["text_config"]
    assert (text["rope_theta"], text["head_dim"], text["num_key_value_heads"]) == (1e6, 160, 32)
    assert read(vision={"adapter_bias": False})["multimodal_projector_bias"] is False
    assert read(vision={"image_token_id": 9})["image_token_index"] == 9


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", None),
        ("dim", "5120"),
        ("dim", 0),
        ("dim", 2**70),
        ("n_layers", -1),
        ("n_heads", True),
        ("n_heads", 1.5),
        ("norm_eps", 0),
        ("norm_eps", "small"),
        ("rope_theta", [1]),
        ("tied_embeddings", "no"),
        ("sliding_window", [0]),
        ("sliding_window", []),
        ("sliding_window", "wide"),
        ("vision_encoder", [1]),
    ],
)
def test_a_field_that_is_not_what_it_should_be_is_named(read, key, value):
    with pytest.raises(CheckpointCorrupt, match=key):
        read(**{key: value})


@pytest.mark.parametrize(("key", "value"), [("hidden_size", None), ("patch_size", "16"), ("adapter_bias", 1)])
def test_a_vision_field_that_is_not_what_it_should_be_is_named(read, key, value):
    with pytest.raises(CheckpointCorrupt, match=key):
        read(vision={key: value})


@pytest.mark.parametrize("key", ["moe", "q_lora_rank", "kv_lora_rank", "lora", "use_biases"])
def test_a_feature_that_would_change_the_answers_is_refused_by_name(read, key):
    assert read(**{key: False}) == read()
    with pytest.raises(ModelUnsupported, match=key):
        read(**{key: {"factor": 8}})


MERGES = {"mm_projector_id": "patch_merge", "add_pre_mm_projector_layer_norm": True, "spatial_merge_size": 2}


@pytest.mark.parametrize(("key", "value"), [*MERGES.items(), ("mm_projector_id", "resample")])
def test_a_projector_with_only_a_part_of_mistral_3s_is_refused_by_name(read, key, value):
    with pytest.raises(ModelUnsupported, match=key):
        read(vision={key: value})


def test_the_params_of_mistral_small_3_1_become_the_config_of_hugging_face(read):
    """Its ids of -1 (as in Medium 3.5) leave the question to the tokenizer, and `max_image_size` is an older name."""
    sizes = {"patch_size": 14, "image_size": None, "max_image_size": 1540, "image_token_id": -1}
    config = read(vision={**MERGES, **sizes, "image_break_token_id": -1, "image_end_token_id": -1})
    assert config["architectures"] == ["Mistral3ForConditionalGeneration"] and config["model_type"] == "mistral3"
    assert (config["image_token_index"], config["spatial_merge_size"]) == (10, 2)
    assert (config["vision_config"]["patch_size"], config["vision_config"]["image_size"]) == (14, 1540)
    assert config["multimodal_projector_bias"] is False


@pytest.mark.parametrize("tied", [True, False, None])
def test_the_embedding_is_the_head_as_params_say_and_of_mistral_3_where_they_say_nothing(read, tied):
    assert configs.ties_embeddings(read(vision=MERGES, tied_embeddings=tied)) is (tied is not False)
    assert configs.ties_embeddings(read(tied_embeddings=tied)) is (tied is True)


YARN = {"original_max_position_embeddings": 16384, "factor": 16, "beta": 32.0, "alpha": 1.0, "apply_scale": False}
QUERIES = {"original_max_position_embeddings": 16384, "beta": 0.1}


@pytest.mark.parametrize(("vision", "named"), [(None, "Ministral3ForCausalLM"), ({}, "LlavaForConditionalGeneration")])
def test_scaled_positions_and_queries_make_a_ministral_3(read, vision, named):
    blind = {"vision_encoder": None} if vision is None else {}
    config = read(vision, yarn=YARN, llama_4_scaling=QUERIES, **blind)
    text = config.get("text_config", config)
    assert (config["architectures"], text["model_type"]) == ([named], "ministral3") and "rope_theta" not in text
    assert text["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 1e9,
        "factor": 16,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


@pytest.mark.parametrize(("applied", "undone"), [(True, 0.0), (None, 0.0), (False, 1.0)])
def test_apply_scale_says_whether_attention_is_scaled_and_absent_it_is(read, applied, undone):
    text = read(yarn={**YARN, "apply_scale": applied})["text_config"]
    assert text["rope_parameters"]["mscale_all_dim"] == undone and text["rope_parameters"]["llama_4_scaling_beta"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"yarn": {**YARN, "factor": None}}, r"yarn\.factor"),
        ({"yarn": {**YARN, "alpha": "1"}}, r"yarn\.alpha"),
        ({"yarn": 16}, "yarn"),
        ({"llama_4_scaling": {"beta": 0.1}}, r"llama_4_scaling\.original"),
        ({"llama_4_scaling": {**QUERIES, "beta": "0.1"}}, r"llama_4_scaling\.beta"),
        ({"yarn": YARN, "llama_4_scaling": {**QUERIES, "original_max_position_embeddings": 8192}}, "another length"),
    ],
    ids=str,
)
def test_of_scaled_positions_what_is_missing_or_wrong_is_named(read, changes, said):
    with pytest.raises(WeightsError, match=said):
        read(**changes)


def test_another_kind_of_model_is_refused(read):
    with pytest.raises(ModelUnsupported, match="mamba"):
        read(model_type="mamba")


SMALL = {
    "dim": 8,
    "n_layers": 1,
    "head_dim": 4,
    "hidden_dim": 6,
    "n_heads": 2,
    "n_kv_heads": 1,
    "norm_eps": 1e-5,
    "vocab_size": 5,
}
WEIGHTS = {
    "tok_embeddings.weight": torch.zeros(5, 8),
    "norm.weight": torch.ones(8),
    "output.weight": torch.ones(5, 8),
    "layers.0.attention_norm.weight": torch.ones(8),
    "layers.0.ffn_norm.weight": torch.ones(8),
    "layers.0.attention.wq.weight": torch.arange(64.0).view(8, 8),
    "layers.0.attention.wk.weight": torch.arange(32.0).view(4, 8),
    "layers.0.attention.wv.weight": torch.arange(32.0).view(4, 8),
    "layers.0.attention.wo.weight": torch.arange(64.0).view(8, 8),
    "layers.0.feed_forward.w1.weight": torch.full((6, 8), 1.0),
    "layers.0.feed_forward.w2.weight": torch.full((8, 6), 2.0),
    "layers.0.feed_forward.w3.weight": torch.full((6, 8), 3.0),
}
OURS = {
    "tok_embeddings": "language_model.embed_tokens",
    "norm": "language_model.norm",
    "output": "lm_head",
    "layers.0.attention_norm": "language_model.layers.0.input_layernorm",
    "layers.0.ffn_norm": "language_model.layers.0.post_attention_layernorm",
    "layers.0.attention.wq": "language_model.layers.0.self_attn.q_proj",
    "layers.0.attention.wk": "language_model.layers.0.self_attn.k_proj",
    "layers.0.attention.wv": "language_model.layers.0.self_attn.v_proj",
    "layers.0.attention.wo": "language_model.layers.0.self_attn.o_proj",
    "layers.0.feed_forward.w1": "language_model.layers.0.mlp.gate_proj",
    "layers.0.feed_forward.w2": "language_model.layers.0.mlp.down_proj",
    "layers.0.feed_forward.w3": "language_model.layers.0.mlp.up_proj",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "params.json").write_text(json.dumps(SMALL))
    save_file(WEIGHTS, tmp_path / "consolidated.safetensors")
    return tmp_path


def failure(folder: Path, weight_paths: tuple[Path, ...] = ()) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        checkpoint.open(folder, weight_paths).tensors  # noqa: B018
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return caught.value


def in_shards(folder: Path, index: bool) -> None:
    weights = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    places = {}
    for number in (1, 2):
        file = f"consolidated-{number:05d}-of-00002.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number - 1 :: 2]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    if index:
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def assert_whole(opened: checkpoint.Checkpoint) -> None:
    assert opened.form == "native"
    assert set(opened.tensors) == {f"{name}.weight" for name in OURS.values()}
    for theirs, ours in OURS.items():
        expected = WEIGHTS[f"{theirs}.weight"]
        if theirs.endswith("wq"):
            expected = expected[[0, 2, 1, 3, 4, 6, 5, 7]]
        if theirs.endswith("wk"):
            expected = expected[[0, 2, 1, 3]]
        assert opened.tensor(f"{ours}.weight").equal(expected), theirs


@pytest.mark.parametrize("parts", ["one file", "shards", "shards with an index"])
def test_every_tensor_gets_our_name_and_rotary_rows_our_order(folder, parts):
    if parts != "one file":
        in_shards(folder, "index" in parts)
    assert_whole(checkpoint.open(folder))


def test_only_rotary_rows_are_copied(folder):
    opened = checkpoint.open(folder)

    def copied(name: str) -> bool:
        """Whether a second look does not see what was written into the first."""
        name = f"language_model.layers.0.{name}.weight"
        opened.tensor(name).fill_(7)
        return not opened.tensor(name).eq(7).all()

    assert {name for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj") if copied(name)} == {
        "self_attn.q_proj"
    }


@pytest.mark.parametrize(
    "missing", ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"]
)
@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(folder, missing, index):
    in_shards(folder, index)
    (folder / missing).unlink()
    error = failure(folder)
    assert isinstance(error, CheckpointCorrupt) and missing in str(error)


@pytest.mark.parametrize("weight_path", ["consolidated.safetensors", "."])
def test_native_weights_by_path_take_their_order_from_the_params_beside_them(folder, tmp_path, weight_path):
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text('{"model_type": "mistral"}')
    opened = checkpoint.open(hf, [folder / weight_path])
    assert opened.form == "hf" and opened.config == {"model_type": "mistral"}
    q = opened.tensor("language_model.layers.0.self_attn.q_proj.weight")
    assert q.equal(WEIGHTS["layers.0.attention.wq.weight"][[0, 2, 1, 3, 4, 6, 5, 7]])


def test_native_weights_without_params_are_not_guessed_at(folder):
    (folder / "params.json").rename(folder / "config.json")
    (folder / "consolidated.safetensors").rename(folder / "model.safetensors")
    error = failure(folder)
    assert isinstance(error, WeightsNotFound) and "params.json" in str(error)


def test_rows_that_the_heads_do_not_divide_are_refused(folder):
    weights = WEIGHTS | {"layers.0.attention.wq.weight": torch.zeros(6, 8)}
    save_file(weights, folder / "consolidated.safetensors")
    with pytest.raises(CheckpointCorrupt, match=r"layers\.0\.attention\.wq\.weight.*6 rows"):
        checkpoint.open(folder).tensor("language_model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("heads", [8, 16])
def test_heads_of_one_row_or_none_are_refused(folder, heads):
    params = SMALL | {"n_heads": heads, "n_kv_heads": heads}
    del params["head_dim"]  # which is then dim / n_heads, rounded down
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointCorrupt, match=r"layers\.0\.attention\.wq\.weight.*heads"):
        checkpoint.open(folder).tensor("language_model.layers.0.self_attn.q_proj.weight")


def test_a_pickle_of_the_older_native_form_is_never_opened(folder):
    (folder / "consolidated.safetensors").unlink()
    (folder / "consolidated.00.pth").write_bytes(b"never opened")
    assert isinstance(failure(folder), PickleRefused)


def test_vision_names_are_ours():
    layer = "vision_encoder.transformer.layers.23."
    theirs = (
        ["attention_norm", "ffn_norm"] + [f"attention.w{x}" for x in "qkvo"] + [f"feed_forward.w{x}" for x in "123"]
    )
    ours = ["attention_norm", "ffn_norm"] + [f"attention.{x}_proj" for x in "qkvo"]
    ours += [f"feed_forward.{x}_proj" for x in ("gate", "down", "up")]
    for their, our in zip(theirs, ours, strict=True):
        assert names.from_native(f"{layer}{their}.weight") == f"vision_tower.layers.23.{our}.weight"
    assert names.from_native("vision_encoder.patch_conv.weight") == "vision_tower.patch_conv.weight"
    assert names.from_native("vision_encoder.ln_pre.weight") == "vision_tower.ln_pre.weight"
    for their, our in (("w_in", "linear_1"), ("w_out", "linear_2")):
        for kind in ("weight", "bias"):
            found = names.from_native(f"vision_language_adapter.{their}.{kind}")
            assert found == f"multi_modal_projector.{our}.{kind}"


@pytest.mark.parametrize("name", ["layers.0.attention.wq.bias", "layers.x.attention.wq.weight", "patch_merger.weight"])
def test_a_name_without_a_place_is_kept_for_the_error_that_reports_it(name):
    assert names.from_native(name) == name
