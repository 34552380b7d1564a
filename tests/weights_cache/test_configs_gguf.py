"""Promises of the config that a GGUF's metadata gives. The files are gguf-py's; expected configs are spelled out."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, RopeScalingType
from support import format_builders

from weights_cache import checkpoint
from weights_cache.errors import CheckpointCorrupt, ModelUnsupported, UnknownArchitecture, WeightsNotFound
from weights_cache.names import from_gguf

NEMO = {
    "context_length": 1024000,
    "embedding_length": 5120,
    "block_count": 40,
    "feed_forward_length": 14336,
    "head_count": 32,
    "head_count_kv": 8,
    "key_length": 128,
    "value_length": 128,
    "rope_dimension_count": 128,
    "rope_freq_base": 1e6,
    "layer_norm_rms_eps": 1e-5,
    "vocab_size": 131072,
}


@pytest.fixture
def text(tmp_path: Path):
    """Writes a text GGUF of NEMO's metadata and changes (None removes one), without weights; returns its path."""

    def text(arch: str = "llama", edit=lambda writer: None, tokens=("<unk>", "[IMG]"), **changes) -> Path:
        def settle(writer: GGUFWriter) -> None:
            for key, value in {**NEMO, **changes}.items():
                if value is not None:
                    getattr(writer, f"add_{key}")(value)
            if tokens:
                writer.add_token_list(list(tokens))
            edit(writer)

        return write(tmp_path / "model.gguf", arch, settle)

    return text


@pytest.fixture
def pictures(tmp_path: Path):
    """Likewise the picture part, with Pixtral-12B's sizes."""
    sizes = {
        "projection_dim": 5120, "image_size": 1024, "patch_size": 16, "embedding_length": 1024,
        "feed_forward_length": 4096, "block_count": 24, "head_count": 16, "attention_layernorm_eps": 1e-5,
    }  # fmt: skip

    def pictures(edit=lambda writer: None, kind: str = "pixtral", tensors=("mm.1.bias",), **changes) -> Path:
        def settle(writer: GGUFWriter) -> None:
            writer.add_clip_projector_type(kind)
            for key, value in {**sizes, **changes}.items():
                if value is not None:
                    getattr(writer, f"add_vision_{key}")(value)
            edit(writer)

        return write(tmp_path / "mmproj.gguf", "clip", settle, tensors)

    return pictures


def yarn(writer: GGUFWriter) -> None:
    """As llama.cpp's `conversion/mistral3.py` writes it for Ministral 3, but for the scale of queries."""
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(16.0)
    writer.add_rope_scaling_orig_ctx_len(16384)
    writer.add_rope_scaling_yarn_beta_fast(32.0)
    writer.add_rope_scaling_yarn_beta_slow(1.0)
    writer.add_rope_scaling_yarn_log_mul(1.0)


def write(path: Path, arch: str, edit, tensors=("output.weight",)) -> Path:
    writer = GGUFWriter(path, arch)
    edit(writer)
    for name in tensors:
        writer.add_tensor(name, np.zeros(4, np.float32))
    format_builders.finish(writer)
    return path


def config(path: Path) -> dict:
    return checkpoint.open(path).config


@pytest.mark.parametrize("arch", ["llama", "mistral3"])
def test_a_text_models_metadata_becomes_the_config_of_hugging_face(text, arch):
    assert config(text(arch)) == {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 1024000,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize(("arch", "beta"), [("mistral3", 0.1), ("llama", None)])
def test_scaled_positions_and_queries_make_a_ministral_3(text, arch, beta):
    found = config(text(arch, edit=lambda w: yarn(w) or (beta and w.add_attn_temperature_scale(beta))))
    assert (found["architectures"], found["model_type"]) == (["Ministral3ForCausalLM"], "ministral3")
    assert "rope_theta" not in found and found["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": beta or 0.0,
    }


def test_what_scaled_positions_leave_out_has_llama_cpps_default(text):
    rope = config(text(edit=lambda w: w.add_rope_scaling_type(RopeScalingType.YARN)))["rope_parameters"]
    assert (rope["factor"], rope["beta_fast"], rope["beta_slow"], rope["mscale_all_dim"]) == (1.0, 32.0, 1.0, 0.0)
    assert rope["original_max_position_embeddings"] == NEMO["context_length"]


def test_what_a_file_may_leave_out_has_the_formats_default(text):
    changes = dict.fromkeys(("key_length", "value_length", "rope_dimension_count", "rope_freq_base", "head_count_kv"))
    found = config(text(**changes, vocab_size=None))
    assert (found["head_dim"], found["rope_theta"], found["num_key_value_heads"]) == (160, 1e4, 32)
    assert found["vocab_size"] == 2


def test_the_windows_and_ends_that_a_file_states_come_along(text):
    def edit(writer: GGUFWriter) -> None:
        writer.add_sliding_window(4096)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    found = config(text(edit=edit))
    assert (found["sliding_window"], found["bos_token_id"], found["eos_token_id"]) == (4096, 1, 2)
    assert config(text(edit=lambda w: edit(w) or w.add_eot_token_id(5)))["eos_token_id"] == [2, 5]


def test_a_picture_part_beside_it_makes_a_pixtral(text, pictures):
    pictures()
    found = config(text())
    assert found["architectures"] == ["LlavaForConditionalGeneration"]
    assert (found["image_token_index"], found["multimodal_projector_bias"]) == (1, True)
    assert found["text_config"]["hidden_size"] == 5120
    assert found["vision_config"] == {
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
    pictures(tensors=("v.pre_ln.weight",))
    assert config(text())["multimodal_projector_bias"] is False


def test_another_architecture_is_refused_with_those_that_are_known(text):
    with pytest.raises(UnknownArchitecture, match=r"qwen2.*llama, mistral3"):
        config(text("qwen2"))


@pytest.mark.parametrize(
    "key",
    ["embedding_length", "block_count", "feed_forward_length", "head_count", "layer_norm_rms_eps", "context_length"],
)
def test_a_missing_size_is_named(text, key):
    wrong = {"layer_norm_rms_eps": "layer_norm_rms_epsilon"}.get(key, key)
    with pytest.raises(CheckpointCorrupt, match=wrong):
        config(text(**{key: None}))


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.add_head_count([32] * 40),
        lambda w: w.add_float32("llama.block_count", 40.0),
        lambda w: w.add_string("llama.block_count", "40"),
        lambda w: w.add_uint32("llama.block_count", 0),
        lambda w: w.add_float32("llama.rope.freq_base", float("nan")),
        lambda w: w.add_bool("llama.context_length", True),
    ],
)
def test_a_size_of_another_kind_is_named(text, edit):
    left_out = dict.fromkeys(("head_count", "block_count", "rope_freq_base", "context_length"))
    rest = {"llama.attention.head_count": 32, "llama.block_count": 40, "llama.context_length": 9}

    def whole(writer: GGUFWriter) -> None:
        edit(writer)
        for key, value in rest.items():
            if key not in writer.kv_data[0]:
                writer.add_uint32(key, value)

    with pytest.raises(CheckpointCorrupt, match="'llama"):
        config(text(edit=whole, **left_out))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.add_rope_scaling_type(RopeScalingType.LONGROPE), "longrope"),
        (lambda w: yarn(w) or w.add_rope_scaling_attn_factors(2.0), r"attn_factor = 2\.0"),
        (lambda w: yarn(w) or w.add_rope_scaling_yarn_attn_factor(2.0), r"yarn_attn_factor = 2\.0"),
        (lambda w: yarn(w) or w.add_rope_scaling_yarn_ext_factor(0.5), r"yarn_ext_factor = 0\.5"),
        (lambda w: w.add_rope_scaling_factor(4.0), "4"),
        (lambda w: w.add_expert_count(8), "expert_count"),
        (lambda w: w.add_logit_scale(0.5), "logit_scale"),
        (lambda w: w.add_sliding_window_pattern([True, False]), "sliding_window_pattern"),
    ],
)
def test_a_feature_that_would_change_the_answers_is_refused_by_name(text, edit, said):
    with pytest.raises(ModelUnsupported, match=said):
        config(text(edit=edit))


@pytest.mark.parametrize("key", ["value_length", "rope_dimension_count"])
def test_heads_that_turn_in_part_are_refused(text, key):
    with pytest.raises(ModelUnsupported, match="64 for heads of 128"):
        config(text(**{key: 64}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "gemma3"}, "gemma3"),
        ({"spatial_merge_size": 2}, "spatial_merge_size 2 without a tensor mm.patch_merger.weight"),
        ({"attention_layernorm_eps": 1e-6}, "1e-06"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std"),
    ],
)
def test_another_kind_of_picture_part_that_is_given_is_refused(text, pictures, changes, said):
    model, part = text(), pictures(**changes)
    with pytest.raises(ModelUnsupported, match=said):
        checkpoint.open(model, [part])


def test_a_picture_part_that_merges_patches_makes_a_mistral_3(text, pictures):
    part = pictures(spatial_merge_size=2, tensors=("mm.patch_merger.weight",))
    found = checkpoint.open(text(), [part]).config
    assert found["architectures"] == ["Mistral3ForConditionalGeneration"] and found["model_type"] == "mistral3"
    assert (found["spatial_merge_size"], found["multimodal_projector_bias"]) == (2, False)


def test_pictures_need_a_token(text, pictures):
    part, blind = pictures(), text(tokens=("<unk>",))
    opened = checkpoint.open(blind)
    assert "vision_config" not in opened.config and "fits" in opened.note
    with pytest.raises(ModelUnsupported, match=r"\[IMG\]"):
        checkpoint.open(blind, [part])
    assert config(text(tokens=()))["image_token_index"] == 10


@pytest.mark.parametrize("beside", [True, False])
def test_tokens_that_are_no_list_are_refused(text, pictures, beside):
    if beside:
        pictures()
    with pytest.raises(CheckpointCorrupt, match="tokens"):
        config(text(tokens=(), vocab_size=None, edit=lambda w: w.add_uint32("tokenizer.ggml.tokens", 7)))


def test_a_given_picture_part_of_another_width_is_refused(text, pictures):
    with pytest.raises(CheckpointCorrupt, match=r"4096.*5120"):
        checkpoint.open(text(), [pictures(projection_dim=4096)])


def test_the_tokenizer_is_handed_on_as_it_is_written(text):
    def edit(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_chat_template("{{ messages }}")

    opened = checkpoint.open(text(edit=edit))
    expected = {"model": "gpt2", "tokens": ["<unk>", "[IMG]"], "chat_template": "{{ messages }}"}
    assert opened.written_tokenizer == expected and opened.file("tokenizer.json") is None
    assert checkpoint.open(text(tokens=())).written_tokenizer is None


def test_side_files_beside_a_gguf_are_not_its_own(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    opened = checkpoint.open(text())
    assert opened.file("tokenizer.json") is None and opened.generation_config == {}


def test_a_folder_without_a_model_and_a_file_of_another_kind_are_refused(tmp_path):
    (tmp_path / "model.txt").write_text("")
    for path in (tmp_path, tmp_path / "model.txt"):
        with pytest.raises(WeightsNotFound):
            checkpoint.open(path)
    with pytest.raises(WeightsNotFound, match="GGUF"):
        checkpoint.open(None, [])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_embd.weight", "language_model.embed_tokens.weight"),
        ("output_norm.weight", "language_model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.39.attn_norm.weight", "language_model.layers.39.input_layernorm.weight"),
        ("blk.39.ffn_norm.weight", "language_model.layers.39.post_attention_layernorm.weight"),
        ("blk.39.attn_output.weight", "language_model.layers.39.self_attn.o_proj.weight"),
        ("blk.39.ffn_gate.weight", "language_model.layers.39.mlp.gate_proj.weight"),
        ("v.patch_embd.weight", "vision_tower.patch_conv.weight"),
        ("v.blk.3.ln2.weight", "vision_tower.layers.3.ffn_norm.weight"),
        ("v.blk.3.attn_out.weight", "vision_tower.layers.3.attention.o_proj.weight"),
        ("mm.2.bias", "multi_modal_projector.linear_2.bias"),
        ("rope_freqs.weight", None),
        ("v.token_embd.img_break", None),
        ("blk.0.attn_q.bias", "blk.0.attn_q.bias"),
        ("mm.input_norm.weight", "multi_modal_projector.norm.weight"),
        ("mm.patch_merger.weight", "multi_modal_projector.patch_merger.merging_layer.weight"),
        ("mm.3.weight", "mm.3.weight"),
    ],
)
def test_names_are_ours_or_kept_for_the_error_that_reports_them(theirs, ours):
    assert from_gguf(theirs) == ours
