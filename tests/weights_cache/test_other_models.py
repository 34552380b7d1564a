"""Models that do not run here are refused by name, by their config, before anything else of them is asked for."""

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter
from support import format_builders

from pixtral_cli.cli.main import run_program
from weights_cache import checkpoint
from weights_cache.errors import OtherModel

REPO = "acme/others"
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
TOWER = {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
SMALL_4_TEXT = {"model_type": "mistral4", "kv_lora_rank": 256, "q_lora_rank": 1024, "n_routed_experts": 128}
SMALL_4 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": SMALL_4_TEXT,
    "vision_config": TOWER,
}
LARGE_4 = {
    "architectures": ["MistralLarge4ForConditionalGeneration"],
    "model_type": "mistral_large4",
    "text_config": {"model_type": "mistral_large4_text", "vocab_size": 204800, "kv_lora_rank": 512},
    "vision_config": TOWER | {"hidden_size": 2048, "num_hidden_layers": 30},
}


def llava(text: str, tower: str, kind: str = "llava", architecture: str = "LlavaForConditionalGeneration") -> dict:
    parts = {"text_config": {"model_type": text}, "vision_config": {"model_type": tower}}
    return {"architectures": [architecture], "model_type": kind, **parts}


CONFIGS = {
    "Small 4": (SMALL_4, "Mistral Small 4, a mixture of experts with latent attention"),
    "Small 4 in FP8": (SMALL_4 | {"quantization_config": FP8}, "Mistral Small 4"),
    "Small 4 in NVFP4": (SMALL_4 | {"quantization_config": NVFP4}, "Mistral Small 4"),
    "Large 4": (LARGE_4, "Mistral Large 4, a mixture of experts with latent attention"),
    "Mixtral": (
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8},
        "Mixtral, a mixture of experts",
    ),
    "Mixtral in AWQ": ({"model_type": "mixtral", "num_local_experts": 8, "quantization_config": AWQ}, "Mixtral"),
    "a mixture of another name": (
        {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 64},
        "a mixture of experts (olmoe)",
    ),
    "DeepSeek": (
        {"model_type": "deepseek_v3", "n_routed_experts": 256, "kv_lora_rank": 512},
        "a mixture of experts with latent attention (deepseek_v3)",
    ),
    "latent attention": (
        {"architectures": ["MiniCPM3ForCausalLM"], "model_type": "minicpm3", "kv_lora_rank": 256},
        "a model with latent attention (minicpm3)",
    ),
    "SigLIP": (llava("mistral", "siglip_vision_model"), "vision tower is SigLIP's"),
    "Qwen as text": (llava("qwen2", "pixtral"), "text part is Qwen's (qwen2)"),
    "Gemma": (llava("gemma3_text", "siglip_vision_model", "gemma3", "Gemma3ForConditionalGeneration"), "SigLIP's"),
    "Qwen": ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "Qwen's models (qwen3)"),
    "Qwen in AWQ": ({"model_type": "qwen2", "quantization_config": AWQ}, "Qwen's models (qwen2)"),
    "LLaVA-NeXT": (
        llava("mistral", "clip_vision_model", "llava_next", "LlavaNextForConditionalGeneration"),
        "LLaVA-NeXT, which cuts pictures into tiles",
    ),
    "Voxtral": (
        {
            "architectures": ["VoxtralForConditionalGeneration"],
            "model_type": "voxtral",
            "audio_config": {"model_type": "voxtral_encoder"},
            "text_config": {"model_type": "llama"},
        },
        "Voxtral, which listens",
    ),
    "one that listens": ({"model_type": "ears", "audio_config": {"model_type": "w"}}, "a model that listens (ears)"),
    "EAGLE": ({"architectures": ["EagleMistralForCausalLM"], "model_type": "mistral"}, "an EAGLE head"),
    "EAGLE 3": ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, "an EAGLE head"),
}
YARN = {"original_max_position_embeddings": 8192, "factor": 36, "beta": 32.0, "alpha": 1.0, "apply_scale": False}
LARGE_3 = {
    "dim": 7168,
    "n_layers": 61,
    "n_heads": 128,
    "hidden_dim": 16384,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 131072,
    "norm_eps": 1e-6,
    "yarn": YARN,
    "moe": {"num_experts": 128, "num_experts_per_tok": 4, "num_shared_experts": 1, "first_k_dense_replace": 3},
    "vision_encoder": {"hidden_size": 1664},
}
NATIVE = {
    "Large 3": (LARGE_3, "Mistral Large 3, a mixture of experts (moe) with latent attention (kv_lora_rank)"),
    "Large 3 in NVFP4": (LARGE_3 | {"quantization_config": NVFP4}, "Mistral Large 3"),
    "Small 4": (LARGE_3 | {"dim": 4096, "n_layers": 36}, "Mistral Small 4, a mixture of experts"),
    "a new size": (LARGE_3 | {"n_layers": [61]}, "is a mixture of experts (moe) with latent attention (kv_lora_rank)"),
    "Large 3's EAGLE": (LARGE_3 | {"moe": None, "n_layers": 2}, "latent attention (kv_lora_rank), as heads that draft"),
    "Mixtral": ({"dim": 4096, "n_layers": 32, "moe": {"num_experts": 8}}, "a mixture of experts (moe)"),
    "Voxtral": ({"dim": 3072, "multimodal": {"whisper_model_args": {"encoder_args": {}}}}, "Voxtral, which listens"),
}
UNKNOWN = {"architectures": ["FooForCausalLM"], "model_type": "foo"}


def hf(config: dict) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": b'{"model": {}}',
        "model.safetensors.index.json": INDEX,
        "model-00001-of-00001.safetensors": b"large",
    }


def native(params: dict) -> dict[str, bytes]:
    return {"params.json": json.dumps(params).encode(), "tekken.json": b"{}", "consolidated.safetensors": b"large"}


REPOSITORIES = {
    **{kind: (hf(config), said) for kind, (config, said) in CONFIGS.items()},
    **{f"{kind}, native": (native(params), said) for kind, (params, said) in NATIVE.items()},
}
COMMANDS = {"inspect": [], "download": [], "run": ["-p", "hi", "--model-path"]}


def refusal(capfd: pytest.CaptureFixture, *arguments: str) -> tuple[str, str]:
    """The sentence and the advice of a command that ends in an error."""
    assert run_program(list(arguments)) == 1
    out, err = capfd.readouterr()
    sentence, advice = err.replace("\r", "\n").strip().splitlines()[-2:]
    assert out == "" and sentence.endswith(".") and advice
    return sentence, advice


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_every_command_names_it_and_asks_for_the_config_alone(hub, capfd, kind: str):
    hub.repos[REPO], said = REPOSITORIES[kind]
    for command, options in COMMANDS.items():
        hub.requests.clear()
        sentence, advice = refusal(capfd, command, *options, REPO)
        assert f"{REPO} is " in sentence and said in sentence and "does not run here" in sentence
        assert "Take " in advice
        assert set(hub.fetched()) <= {"config.json", "params.json"}


@pytest.mark.parametrize("kind", ["Small 4 in FP8", "Large 3, native"])
def test_a_server_does_not_start_with_it(hub, capfd, kind: str):
    hub.repos[REPO], said = REPOSITORIES[kind]
    assert said in refusal(capfd, "serve", "--port", "0", "--model-path", REPO)[0]
    assert set(hub.fetched()) <= {"config.json", "params.json"}


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_a_folder_of_it_is_refused_alike(tmp_path: Path, kind: str):
    files, said = REPOSITORIES[kind]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OtherModel) as refused:
        checkpoint.open(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path} is ") and said in str(refused.value)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (UNKNOWN, "FooForCausalLM"),
        (UNKNOWN | {"quantization_config": AWQ}, "FooForCausalLM"),
        ({"architectures": ["MistralForCausalLM"], "hidden_act": "relu"}, "hidden_act"),
        ({"architectures": ["MistralForCausalLM"], "quantization_config": AWQ}, "awq (4 bits)"),
        ({"architectures": ["MistralForCausalLM"], "quantization_config": NVFP4}, "nvfp4-pack-quantized"),
        ({"architectures": ["MistralForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        (llava("mistral", "a_tower_of_tomorrow"), "a_tower_of_tomorrow"),
    ],
    ids=str,
)
def test_whatever_else_cannot_be_run_is_said_as_early(hub, capfd, config: dict, said: str, command: str):
    hub.repos[REPO] = hf(config)
    assert said in refusal(capfd, command, *COMMANDS[command], REPO)[0]
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    ("architecture", "experts", "said"),
    [
        ("mistral4", 128, "Mistral Small 4, a mixture of experts with latent attention"),
        ("deepseek2", 128, "Mistral Large 3"),
        ("llama", 8, "a mixture of experts (llama.expert_count = 8)"),
    ],
)
def test_a_gguf_of_it_is_named(tmp_path: Path, architecture: str, experts: int, said: str):
    writer = GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_expert_count(experts)
    format_builders.finish(writer)
    with pytest.raises(OtherModel) as refused:
        checkpoint.open(tmp_path / "model.gguf")
    assert said in str(refused.value) and "without experts" in refused.value.hint
