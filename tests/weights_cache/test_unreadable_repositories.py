"""Repositories and folders whose weights or tokenizer nobody here reads: told by their small files, in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pixtral_cli.cli.main import run_program
from pixtral_cli.tiny import FOLDER
from weights_cache import checkpoint, quantized_elsewhere
from weights_cache.errors import AdapterOnly, QuantizedElsewhere, WeightsNotFound
from weights_cache.hub import fetch, fetch_headers

REPO = "acme/others"
SMALL = {"tokenizer.json": b'{"model": {}}', "generation_config.json": b"{}"}
WEIGHTS = save({"model.norm.weight": torch.ones(4)})

BY_CONFIG = {
    "another fp8": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fbgemm_fp8"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq (4 bits)"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq (4 bits)"),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    "aqlm": ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "aqlm"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (NVFP4)"),
    "modelopt without a method": ({"producer": {"name": "modelopt"}, "quant_algo": "FP8"}, "modelopt (FP8)"),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
    "a newer one": ({"quant_method": "of-tomorrow"}, "of-tomorrow"),
    "one without a name": ({"scale": 2}, "does not name"),
    "8-bit integers": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes' 8-bit integers"),
    "older 8-bit integers": ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes' 8-bit integers"),
    "fp4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes' fp4"),
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_8bit": False}
FLOAT_QUANTIZED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}


def hf(config: dict, **more: bytes) -> dict[str, bytes]:
    return SMALL | {"config.json": json.dumps(config).encode(), "model.safetensors": WEIGHTS} | more


def native(**params) -> dict[str, bytes]:
    return SMALL | {"params.json": json.dumps(params).encode(), "consolidated.safetensors": WEIGHTS}


REPOSITORIES = {
    **{name: (hf({"quantization_config": section}), said) for name, (section, said) in BY_CONFIG.items()},
    "in text_config": (hf({"text_config": {"quantization_config": {"quant_method": "gptq"}}}), "gptq"),
    "MLX": (hf({"quantization": {"group_size": 64, "bits": 4}}), "MLX (4 bits)"),
    "MLX's older key": (hf({"quantization_config": {"group_size": 64, "bits": 8}}), "MLX (8 bits)"),
    "an older compressed-tensors": (hf({"compression_config": {"quant_method": "compressed-tensors"}}), "compressed-"),
    "quantize_config.json": (hf({}, **{"quantize_config.json": b'{"bits": 4}'}), "gptq"),
    "quant_config.json": (hf({}, **{"quant_config.json": b'{"w_bit": 4}'}), "awq"),
    "hf_quant_config.json": (hf({}, **{"hf_quant_config.json": b"{}"}), "modelopt"),
    "native": (native(quantization={"qformat_weight": "nvfp4", "qscheme_act": "TENSOR"}), "nvfp4"),
    "native as in transformers": (native(quantization_config={"quant_method": "compressed-tensors"}), "compressed-"),
}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_weights_that_others_quantised_are_named_before_any_of_them_is_asked_for(hub, tmp_path: Path, kind: str):
    hub.repos[REPO], said = REPOSITORIES[kind]
    for ask in (lambda: fetch(REPO), lambda: fetch_headers(REPO, tmp_path)):
        with pytest.raises(QuantizedElsewhere) as refused:
            ask()
        assert str(refused.value).startswith(f"{REPO} was quantised with") and said in str(refused.value)
        assert all(word in refused.value.hint for word in ("bfloat16", "GGUF", "nf4"))
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_a_folder_of_such_weights_is_refused_and_its_config_still_serves_other_weights(tmp_path: Path, kind: str):
    files, said = REPOSITORIES[kind]
    folder = put(tmp_path / "model", files)
    with pytest.raises(QuantizedElsewhere) as refused:
        checkpoint.open(folder)
    assert said in str(refused.value) and str(folder) in str(refused.value)
    if "config.json" in files:
        other = put(tmp_path / "other", {"other.safetensors": WEIGHTS}) / "other.safetensors"
        assert checkpoint.open(folder, [other]).tensor("language_model.norm.weight").equal(torch.ones(4))
        assert checkpoint.open(folder, weights=False).config == json.loads(files["config.json"])


def test_such_a_folder_is_refused_as_weights_for_another_config_too(tmp_path: Path):
    model = put(tmp_path / "model", hf({}))
    other = put(tmp_path / "other", hf({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(QuantizedElsewhere, match="other was quantised with gptq"):
        _ = checkpoint.open(model, [other]).tensors


READ = (NF4, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, FLOAT_QUANTIZED)


@pytest.mark.parametrize("config", [{}, *({"quantization_config": section} for section in (None, {}, *READ))])
def test_what_is_read_here_is_let_pass(hub, config: dict):
    quantized_elsewhere.refuse("x", config, ["config.json", "model.safetensors"])
    hub.repos[REPO] = hf(config)
    assert checkpoint.open(fetch(REPO)).config == config


def test_fp8_in_mistrals_own_form_is_read_too():
    for act in ("TENSOR", "NO_SCALES", None):
        quantized_elsewhere.refuse("x", {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": act}})


def test_another_form_that_is_there_is_the_way_out(hub, tmp_path: Path):
    files = hf({"quantization_config": {"quant_method": "gptq"}}, **{"model-Q8_0.gguf": b"GGUF"})
    hub.repos[REPO] = files
    for ask in (lambda: fetch(REPO), lambda: checkpoint.open(put(tmp_path / "model", files))):
        with pytest.raises(QuantizedElsewhere) as refused:
            ask()
        assert "--weights-format gguf" in refused.value.hint
    assert fetch(REPO, form="gguf").name == "model-Q8_0.gguf"


def test_the_small_files_of_such_a_repository_can_be_had(hub):
    hub.repos[REPO] = hf({"quantization_config": {"quant_method": "gptq"}})
    assert (fetch(REPO, weights=False) / "tokenizer.json").is_file()


@pytest.mark.parametrize("command", ["inspect", "download", "run", "serve", "export"])
@pytest.mark.parametrize("kind", ["gptq", "sentencepiece", "lora"])
def test_every_command_that_wants_weights_says_it_in_one_sentence(hub, capfd, tmp_path: Path, command: str, kind: str):
    hub.repos[REPO] = {
        "gptq": hf({"model_type": "mistral", "quantization_config": {"quant_method": "gptq", "bits": 4}}),
        "sentencepiece": {"config.json": b"{}", "tokenizer.model": b"\n", "model.safetensors": WEIGHTS},
        "lora": {"adapter_config.json": b'{"base_model_name_or_path": "acme/base"}', "adapter_model.safetensors": b""},
    }[kind]
    arguments = {
        "inspect": [REPO],
        "download": [REPO],
        "run": ["--model-path", REPO, "-p", "hi"],
        "serve": ["--model-path", REPO, "--port", "0"],
        "export": [REPO, str(tmp_path / "file")],
    }
    assert run_program([command, *arguments[command]]) == 1
    err = capfd.readouterr().err.replace("\r", "")
    word = {"gptq": "gptq (4 bits)", "sentencepiece": "SentencePiece's tokenizer.model", "lora": "acme/base"}[kind]
    assert word in err and "unexpected" not in err
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


# --- tokenizers


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "sentencepiece.bpe.model"])
def test_sentencepiece_alone_is_said_before_weights_are_fetched(hub, tmp_path: Path, name: str):
    files = {"config.json": b"{}", name: b"\n\x0b", "model.safetensors": WEIGHTS}
    hub.repos[REPO] = files
    for ask in (lambda: fetch(REPO), lambda: checkpoint.open(put(tmp_path / "model", files))):
        with pytest.raises(WeightsNotFound, match=f"SentencePiece's {name}") as refused:
            ask()
        assert "tokenizer.json" in refused.value.hint
    assert hub.fetched() == []


def test_a_repository_without_any_tokenizer_is_refused_before_weights_are_fetched(hub):
    hub.repos[REPO] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    with pytest.raises(WeightsNotFound, match=r"tokenizer\.json or tekken\.json"):
        fetch(REPO)
    assert hub.fetched() == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json"])
def test_sentencepiece_beside_a_tokenizer_that_is_read_is_no_matter(hub, name: str):
    hub.repos[REPO] = {"config.json": b"{}", "tokenizer.model": b"", name: b"{}", "model.safetensors": WEIGHTS}
    assert checkpoint.open(fetch(REPO)).file(name)


# --- adapters

LORA = {
    "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "acme/base"}',
    "adapter_model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
}


@pytest.mark.parametrize("more", [{}, {"config.json": b"{}"}], ids=["alone", "with a config"])
def test_an_adapter_is_said_to_be_one_and_of_which_model(hub, tmp_path: Path, more: dict):
    hub.repos[REPO] = LORA | more
    folder = put(tmp_path / "model", LORA | more)
    for where, ask in ((REPO, lambda: fetch(REPO)), (folder, lambda: checkpoint.open(folder).tensors)):
        with pytest.raises(AdapterOnly) as refused:
            ask()
        assert str(refused.value) == f"{where} is a LoRA adapter of acme/base, and no whole model."
        assert "merge_and_unload" in refused.value.hint
    assert hub.fetched() == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("config", "said"), [(b"{}", "does not name"), (b'{"peft_type": "IA3"}', "an adapter (IA3)"), (b'{"r": 8}', "LoRA")]
)
def test_an_adapter_whose_config_says_less_is_still_called_one(tmp_path: Path, config: bytes, said: str):
    folder = put(tmp_path / "model", LORA | {"adapter_config.json": config})
    with pytest.raises(AdapterOnly) as refused:
        checkpoint.open(folder)
    assert said in str(refused.value)


def test_an_adapter_beside_a_whole_model_is_passed_over(tmp_path: Path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    put(folder, {name: content for name, content in LORA.items() if name.startswith("adapter")})
    assert checkpoint.open(folder).tensors.keys() == checkpoint.open(FOLDER).tensors.keys()
