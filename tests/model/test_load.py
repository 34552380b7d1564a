"""Loading: what fits is memory-mapped, what does not fit is named before anything large is read."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import builders

from pixtral_cli.encoding_choices import find
from pixtral_cli.errors import ModelError
from pixtral_cli.model import free_memory, memory
from pixtral_cli.model.families import read_config
from pixtral_cli.model.kernels import KernelLinear
from pixtral_cli.model.load import load
from pixtral_cli.model.placement import place
from weights_cache import checkpoint
from weights_cache.errors import TensorShapeMismatch, TensorsMissing, TensorsUnexpected
from weights_cache.packed import PackedWeight

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    builders.mistral(tmp_path)
    return tmp_path


def open_model(folder, encoding="float32"):
    opened = checkpoint.open(folder)
    return load(opened, read_config(opened.config), place(opened.tensors, find(encoding)), CPU)


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(TensorsMissing, match=r"layers\.1\.mlp\.up_proj"):
        open_model(folder)


def test_weights_of_another_model_are_named_by_the_path_that_was_given(folder, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"model.norm.weight": torch.ones(64)}, other)
    opened = checkpoint.open(folder, [other])
    with pytest.raises(TensorsMissing, match=r"other\.safetensors lacks"):
        load(opened, read_config(opened.config), place(opened.tensors, None), CPU)


def test_a_left_over_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}))
    with pytest.raises(TensorsUnexpected, match=r"layers\.7\.mlp\.up_proj"):
        open_model(folder)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(TensorShapeMismatch, match=r"norm\.weight.*65.*64"):
        open_model(folder)


def test_an_untied_model_without_its_head_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(TensorsMissing, match="lm_head"):
        open_model(folder)


def test_a_tied_head_shares_the_embedding(tmp_path):
    builders.mistral(tmp_path, tie_word_embeddings=True)
    model = open_model(tmp_path)
    assert model.lm_head.weight.data_ptr() == model.language_model.embed_tokens.weight.data_ptr()


def test_weights_of_the_files_dtype_are_mapped_and_not_copied(folder):
    path = str((folder / "model.safetensors").resolve())
    model = open_model(folder)
    pointer = model.language_model.layers[0].mlp.up_proj.weight.data_ptr()
    with open("/proc/self/maps") as maps:
        mapped = [line.split()[0] for line in maps if line.rstrip().endswith(path)]
    spans = [tuple(int(end, 16) for end in span.split("-")) for span in mapped]
    assert any(low <= pointer < high for low, high in spans)


def test_default_encoding_follows_the_checkpoint(folder):
    assert place(checkpoint.open(folder).tensors, None).label == "float32"
    edit_tensors(folder, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    assert place(checkpoint.open(folder).tensors, None).label == "bfloat16"


@pytest.mark.parametrize("name", ["bfloat16", "q4_0", "q6_k", "nf4"])
def test_a_model_that_nobody_has_any_more_gives_its_memory_back_at_once(folder, name):
    """Nothing in it refers to itself: gigabytes need not wait for Python's collector of circles."""
    model = open_model(folder, name)
    layer = model.language_model.layers[1].mlp.up_proj
    layer(torch.ones(1, layer.weight.shape[1], dtype=torch.bfloat16))
    held = weakref.ref(layer.kernel if name != "bfloat16" else layer)
    gc.disable()
    try:
        del model, layer
        assert held() is None
    finally:
        gc.enable()


def test_an_unknown_encoding_lists_the_known():
    with pytest.raises(ModelError) as failure:
        find("int3")
    assert "bfloat16" in failure.value.hint and "q4_k" in failure.value.hint


def held_bytes(model):
    """Bytes of all weights of a model, packed ones included, each once."""
    found = {*model.parameters(), *model.buffers()}
    for layer in model.modules():
        if isinstance(getattr(layer, "weight", None), PackedWeight):
            found |= {*layer.weight.tensors().values()}
        for beside in vars(layer.kernel).values() if isinstance(layer, KernelLinear) else ():
            found |= {part for part in (beside, getattr(beside, "absmax", None)) if isinstance(part, torch.Tensor)}
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "q4_0", "nf4"])
def test_the_plan_counts_the_bytes_that_loading_takes(folder, name):
    tensors = checkpoint.open(folder).tensors
    placement, model = place(tensors, find(name)), open_model(folder, name)
    assert memory.weight_bytes(tensors, placement) == held_bytes(model)


def test_weights_that_cannot_fit_are_refused_with_both_figures_and_what_would_fit(folder, monkeypatch):
    tensors = checkpoint.open(folder).tensors
    wide, narrow = (memory.weight_bytes(tensors, place(tensors, find(name))) for name in ("float32", "bfloat16"))
    between = (wide + narrow) // 2
    monkeypatch.setattr(memory, "WORKSPACE", 0)
    monkeypatch.setattr(memory, "GIB", 2**10)  # so that the figures of a small model show
    monkeypatch.setattr(memory, "free_bytes", lambda device: between)
    config = read_config(checkpoint.open(folder).config)
    with pytest.raises(ModelError) as failure:
        memory.check_weights(tensors, place(tensors, find("float32")), config, CPU, memory.Work())
    assert f"{wide / 1024:.1f} GiB" in str(failure.value) and f"{between / 1024:.1f} GiB" in str(failure.value)
    assert "--quantization-encoding bfloat16" in failure.value.hint


def test_keys_and_values_get_what_the_weights_leave_and_no_more_than_is_wanted(folder, monkeypatch):
    tensors = checkpoint.open(folder).tensors
    placement, config = place(tensors, find("float32")), read_config(checkpoint.open(folder).config)
    plan = memory.plan(tensors, placement, config, "cpu", memory.Work())
    beside = memory.weight_bytes(tensors, placement) + memory.WORKSPACE
    monkeypatch.setattr(memory, "free_bytes", lambda device: beside + memory.kv_bytes(config.text, 1000, "float32"))
    assert memory.kv_tokens(plan, CPU, 500) == 500
    assert memory.kv_tokens(plan, CPU, 10**6) == 900
    monkeypatch.setattr(memory, "free_bytes", lambda device: beside + memory.kv_bytes(config.text, 100, "float32"))
    with pytest.raises(ModelError, match="keys and values: 90 tokens"):
        memory.kv_tokens(plan, CPU, 500)


def test_a_containers_limit_counts(tmp_path):
    for name, text in {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 500\nfile 200"}.items():
        (tmp_path / name).write_text(text + "\n")
    assert free_memory.container_free(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory.container_free(tmp_path) is None
