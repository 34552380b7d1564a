"""One random checkpoint in three forms: the same weights, the same tokens, the same logits as transformers.

Oracles: transformers for the model, gguf-py for what a packed weight is. That the native builder turns rows as
Mistral's own code wants them is proved by running attention with rotated neighbours on what it wrote.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import builders
from support import format_builders as forms
from support.oracles import assert_answers_as
from support.pictures import conversation, noise

from pixtral_cli import Pixtral
from pixtral_cli.source import Source
from weights_cache import checkpoint
from weights_cache.errors import (
    FilesMismatch,
    ModelUnsupported,
    PickleRefused,
    TensorsMissing,
    TensorsUnexpected,
    WeightsNotFound,
)
from weights_cache.formats.gguf import GgufFile
from weights_cache.formats.safetensors import SafetensorsFile

OPTIONS = {"max_new_tokens": 16, "ignore_eos": True}
FORMS = ("hf", "native", "gguf")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with one model as hf/, native/ and gguf/, and transformers' own model and processor."""
    folder = tmp_path_factory.mktemp("forms")
    oracle = builders.pixtral(folder / "hf")
    processor = builders.add_processor(folder / "hf")
    forms.native(folder / "hf", folder / "native")
    forms.write_tekken(folder / "hf", folder / "native")
    (folder / "gguf").mkdir()
    forms.gguf_text(folder / "hf", folder / "gguf/model-f32.gguf")
    forms.gguf_pictures(folder / "hf", folder / "gguf/mmproj-f32.gguf")
    return folder, oracle, processor


def load(path, **options):
    return Pixtral.load(path, devices="cpu", image_preprocessing="hf", quantization_encoding="float32", **options)


CONVERSATIONS = {
    "text": conversation(),
    "picture": conversation(noise(70, 40)),
    "pictures": conversation(noise(200, 33, 1), noise(16, 100, 2)),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tokens_and_logits_of_transformers(models, form, name):
    folder, oracle, processor = models
    assert_answers_as(load(folder / form), oracle, processor, CONVERSATIONS[name])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_very_same_weights(models, form):
    hf, other = checkpoint.open(models[0] / "hf"), checkpoint.open(models[0] / form)
    assert other.form == form and other.note is None
    assert other.tensors.keys() == hf.tensors.keys()
    for name, info in hf.tensors.items():
        assert other.tensors[name].shape == info.shape and other.tensors[name].encoding == "float32"
        assert other.weight(name).equal(hf.tensor(name)) and other.tensor(name).equal(hf.tensor(name)), name


@pytest.mark.parametrize("form", ["native", "gguf"])
def test_a_tensor_whose_rows_are_copied_into_order_is_not_held_twice(models, monkeypatch, form):
    released = []
    for reader in (SafetensorsFile, GgufFile):
        monkeypatch.setattr(reader, "release", lambda self, name: released.append(name))
    load(models[0] / form)
    copied = 2 * builders.TEXT["num_hidden_layers"] + 2 * builders.VISION["num_hidden_layers"]
    assert len(set(released)) == len(released) == copied


def neighbours_turned(x, angles):
    """x [N, heads, D] with each pair of neighbours turned by angles [N, D/2]: complex numbers times a unit."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def attention(x, w, heads, kv_heads, angles, mask):
    """Attention with neighbours turned, as Mistral's own code has it. x [N, C]; w: "wq" … -> weight."""
    q, k, v = (x @ w[name].T for name in ("wq", "wk", "wv"))
    q, k, v = (t.view(len(x), n, -1) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q, k = neighbours_turned(q, angles), neighbours_turned(k, angles)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + mask
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(x), -1) @ w["wo"].T


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def blocks(x, weights, prefix, layers, heads, kv_heads, angles, mask):
    for layer in range(layers):
        w = {name.removeprefix(f"{prefix}{layer}."): t for name, t in weights.items()}
        parts = {name: w[f"attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo")}
        x = x + attention(norm(x, w["attention_norm.weight"]), parts, heads, kv_heads, angles, mask)
        y = norm(x, w["ffn_norm.weight"])
        gated = torch.nn.functional.silu(y @ w["feed_forward.w1.weight"].T) * (y @ w["feed_forward.w3.weight"].T)
        x = x + gated @ w["feed_forward.w2.weight"].T
    return x


def test_the_native_builder_writes_text_rows_that_turn_as_neighbours(models):
    folder, oracle, _ = models
    weights = load_file(folder / "native/consolidated.safetensors")
    ids = torch.arange(20, 45)
    angles = torch.arange(len(ids))[:, None] / 1e6 ** (torch.arange(0, 16, 2) / 16)
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    x = blocks(weights["tok_embeddings.weight"][ids], weights, "layers.", 3, 8, 2, angles, mask)
    logits = norm(x, weights["norm.weight"]) @ weights["output.weight"].T
    with torch.no_grad():
        torch.testing.assert_close(logits, oracle(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_the_native_builder_writes_vision_rows_that_turn_as_neighbours(models):
    folder, oracle, processor = models
    weights = load_file(folder / "native/consolidated.safetensors")
    rows, columns = 3, 5
    inputs = processor("[IMG]", [noise(16 * columns, 16 * rows)])
    patches = torch.nn.functional.conv2d(inputs["pixel_values"], weights["vision_encoder.patch_conv.weight"], stride=16)
    x = norm(patches[0].flatten(1).T, weights["vision_encoder.ln_pre.weight"])
    frequencies = 1 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    angles = torch.cat([row[:, None] * frequencies[::2], column[:, None] * frequencies[1::2]], dim=1)
    x = blocks(x, weights, "vision_encoder.transformer.layers.", 3, 4, 4, angles, torch.zeros(1))
    with torch.no_grad():
        tower = oracle.model.vision_tower(inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    torch.testing.assert_close(x, tower.last_hidden_state[0], atol=1e-4, rtol=1e-4)


def packed_type(name):
    """A mixture, as files have it: rows of 64 and 96 fit blocks of 32."""
    kinds = forms.QUANTS
    return {"attn_q": kinds.Q8_0, "ffn_up": kinds.Q5_1, "token_embd": kinds.BF16}.get(name.split(".")[-2], kinds.Q4_0)


def test_a_packed_gguf_has_exactly_the_decoded_weights_and_runs(models, tmp_path):
    folder, _, _ = models
    forms.gguf_text(folder / "hf", tmp_path / "model.gguf", packed_type)
    shutil.copy(folder / "gguf/mmproj-f32.gguf", tmp_path)
    packed, whole = checkpoint.open(tmp_path), checkpoint.open(folder / "hf")
    encodings = set()
    for name, info in packed.tensors.items():
        expected = whole.tensor(name)
        if info.encoding != "float32":
            encodings.add(info.encoding)
            kind = forms.QUANTS[info.dtype]
            expected = forms.quantized(expected, kind)  # a row is packed by itself, so their order does not matter
            if info.encoding != "bfloat16":
                assert packed.weight(name).rows.shape == (info.shape[0], info.nbytes // info.shape[0])
        assert packed.tensor(name).float().equal(expected), name
    assert encodings == {"q8_0", "q5_1", "bfloat16", "q4_0"}
    reply = load(tmp_path).chat(CONVERSATIONS["picture"], **OPTIONS)
    assert len(reply.token_ids) == 16


def k_quant(name):
    kinds = forms.QUANTS
    return {"attn_q": kinds.Q8_0, "ffn_down": kinds.Q6_K, "output": kinds.Q6_K}.get(name.split(".")[-2], kinds.Q4_K)


def test_a_k_quant_gguf_answers_as_the_exactly_decoded_weights_do(tmp_path):
    """The oracle is a Hugging Face folder of the weights as gguf-py decodes them."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    builders.mistral(tmp_path / "hf", **sizes)
    builders.add_processor(tmp_path / "hf")
    forms.gguf_text(tmp_path / "hf", tmp_path / "model.gguf", k_quant)
    opened = checkpoint.open(tmp_path / "model.gguf")
    decoded = {}
    for name, weight in forms.tensors(tmp_path / "hf").items():
        info = opened.tensors[name.replace("model.", "language_model.")]
        decoded[name] = forms.quantized(weight, forms.QUANTS[info.dtype]) if weight.ndim > 1 else weight
    assert {info.encoding for info in opened.tensors.values()} == {"q4_k", "q6_k", "q8_0", "float32"}
    forms.save_file(decoded, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    expected = load(tmp_path / "hf").chat(CONVERSATIONS["text"], logprobs=5, **OPTIONS)
    reply = load(tmp_path / "model.gguf").chat(CONVERSATIONS["text"], logprobs=5, **OPTIONS)
    assert reply.token_ids == expected.token_ids
    ours, theirs = ([top.logprob for entry in r.logprobs for top in entry.top] for r in (reply, expected))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_ggufs_by_weight_path_take_config_and_tokenizer_from_the_folder(models, tmp_path):
    folder, _, _ = models
    for file in (folder / "hf").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    paths = [folder / "gguf/model-f32.gguf", folder / "gguf/mmproj-f32.gguf"]
    expected = load(folder / "hf").chat(CONVERSATIONS["picture"], **OPTIONS).token_ids
    for weight_paths in (paths, paths[::-1], paths[:1]):
        ours = load(tmp_path, weight_paths=weight_paths)
        assert ours.source.checkpoint.form == "hf"
        assert ours.chat(CONVERSATIONS["picture"], **OPTIONS).token_ids == expected


@pytest.mark.parametrize("order", [1, -1])
def test_a_gguf_and_its_picture_part_given_in_any_order_are_a_model(models, tmp_path, order):
    folder, _, _ = models
    (tmp_path / "elsewhere").mkdir()
    text = shutil.copy(folder / "gguf/model-f32.gguf", tmp_path / "a.gguf")
    pictures = shutil.copy(folder / "gguf/mmproj-f32.gguf", tmp_path / "elsewhere/mmproj.gguf")
    assert "vision_config" not in checkpoint.open(text).config
    opened = checkpoint.open(None, [text, pictures][::order])
    assert opened.folder == text and "vision_config" in opened.config
    assert opened.tensors.keys() == checkpoint.open(folder / "hf").tensors.keys()
    ours = load(None, weight_paths=[text, pictures][::order])
    assert ours.name == "a.gguf"
    expected = load(folder / "hf").chat(CONVERSATIONS["picture"], **OPTIONS)
    assert ours.chat(CONVERSATIONS["picture"], **OPTIONS).token_ids == expected.token_ids


def test_files_of_two_models_are_said_not_to_go_together_and_none_is_called_damaged(models, tmp_path):
    folder, other = models[0], tmp_path / "other"
    builders.pixtral(other, hidden_size=128, head_dim=32)
    forms.gguf_pictures(other, tmp_path / "mmproj.gguf")
    text = folder / "gguf/model-f32.gguf"
    for paths in ([text, tmp_path / "mmproj.gguf"], [folder / "native", text]):
        with pytest.raises(FilesMismatch, match="do not go together") as refused:
            load(None if text in paths[:1] else folder / "native", weight_paths=paths)
        assert "damaged" not in str(refused.value) and "--force-download" not in refused.value.hint
        assert all(path.name in str(refused.value) for path in paths)


@pytest.mark.parametrize("form", FORMS)
def test_side_files_are_all_that_a_model_needs_beside_its_weights(models, tmp_path, form):
    opened = checkpoint.open(models[0] / form)
    for name, data in opened.side_files().items():
        (tmp_path / name).write_bytes(data)
    written = tmp_path / "gguf_tokenizer.json"
    again = checkpoint.Checkpoint(
        tmp_path,
        json.loads((tmp_path / "config.json").read_text()),
        form=form,
        written_tokenizer=json.loads(written.read_text()) if written.exists() else None,
    )
    assert again.config == opened.config
    ours, theirs = (Source("", each, "hf") for each in (again, opened))
    assert ours.chat(CONVERSATIONS["picture"]).token_ids == theirs.chat(CONVERSATIONS["picture"]).token_ids
    assert ours.end_token_ids == theirs.end_token_ids


def test_of_two_forms_in_a_folder_one_is_chosen_and_said_and_the_other_can_be_asked_for(models, tmp_path):
    folder, _, _ = models
    for form in ("hf", "native"):
        shutil.copytree(folder / form, tmp_path, dirs_exist_ok=True)
    chosen = checkpoint.open(tmp_path)
    assert chosen.form == "hf" and str(tmp_path) in chosen.note and "--weights-format" in chosen.note
    assert {info.file.name for info in chosen.tensors.values()} == {"model.safetensors"}
    for form, file in (("hf", "model.safetensors"), ("native", "consolidated.safetensors")):
        asked = checkpoint.open(tmp_path, form=form)
        assert (asked.form, asked.note) == (form, None)
        assert {info.file.name for info in asked.tensors.values()} == {file}
    with pytest.raises(WeightsNotFound, match="GGUF") as failure:
        checkpoint.open(tmp_path, form="gguf")
    assert "hf or native" in failure.value.hint


def test_one_of_several_picture_parts_is_chosen_and_said(models, tmp_path):
    shutil.copytree(models[0] / "gguf", tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "mmproj-f32.gguf", tmp_path / "mmproj-BF16.gguf")
    opened = checkpoint.open(tmp_path)
    assert "mmproj-BF16.gguf" in opened.note and "vision_config" in opened.config


def test_a_picture_part_of_another_model_beside_a_gguf_is_left_alone_and_said(models, tmp_path):
    shutil.copy(models[0] / "gguf/model-f32.gguf", tmp_path)
    builders.pixtral(tmp_path / "wide", hidden_size=96)
    forms.gguf_pictures(tmp_path / "wide", tmp_path / "mmproj-wide.gguf")
    opened = checkpoint.open(tmp_path / "model-f32.gguf")
    assert "vision_config" not in opened.config and "fits" in opened.note
    with pytest.raises(Exception, match="96"):
        checkpoint.open(tmp_path / "model-f32.gguf", [tmp_path / "mmproj-wide.gguf"])


def test_several_ggufs_in_a_folder_need_a_choice(models, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(models[0] / "gguf/model-f32.gguf", tmp_path / name)
    with pytest.raises(WeightsNotFound, match=r"a\.gguf, b\.gguf") as failure:
        checkpoint.open(tmp_path)
    assert ".gguf file itself" in failure.value.hint


def test_a_picture_part_alone_is_no_model(models):
    with pytest.raises(WeightsNotFound, match="picture part"):
        checkpoint.open(models[0] / "gguf/mmproj-f32.gguf")


@pytest.mark.parametrize("form", ["native", "gguf"])
def test_a_text_model_is_a_model_in_every_form(tmp_path, form):
    builders.mistral(tmp_path / "hf", tie_word_embeddings=True)
    builders.add_processor(tmp_path / "hf")
    if form == "native":
        forms.native(tmp_path / "hf", tmp_path / form, tied_embeddings=True)
        forms.write_tekken(tmp_path / "hf", tmp_path / form)
    else:
        (tmp_path / form).mkdir()
        forms.gguf_text(tmp_path / "hf", tmp_path / form / "model.gguf")
    expected = load(tmp_path / "hf").chat(CONVERSATIONS["text"], **OPTIONS)
    ours = load(tmp_path / form)
    assert ours.source.config.text.tied_embeddings
    assert ours.chat(CONVERSATIONS["text"], **OPTIONS).token_ids == expected.token_ids


def test_sliding_windows_come_through_every_form(tmp_path):
    builders.ministral(tmp_path / "hf")
    builders.add_processor(tmp_path / "hf")
    forms.native(tmp_path / "hf", tmp_path / "native", sliding_window=None, _sliding_window=[None, 7, 7])
    forms.write_tekken(tmp_path / "hf", tmp_path / "native")
    expected, ours = load(tmp_path / "hf"), load(tmp_path / "native")
    assert ours.source.config.text.sliding_windows == expected.source.config.text.sliding_windows == (None, 7, 7)
    asked = conversation(text="what is in the picture? where is the other one?")
    assert ours.chat(asked, **OPTIONS).token_ids == expected.chat(asked, **OPTIONS).token_ids


@pytest.mark.parametrize(("form", "name"), [("native", "layers.1.attention.wq.bias"), ("gguf", "blk.1.attn_q.bias")])
def test_a_tensor_that_has_no_place_is_named_in_the_files_own_words(models, tmp_path, form, name):
    folder, _, _ = models
    if form == "native":
        shutil.copytree(folder / "native", tmp_path, dirs_exist_ok=True)
        weights = load_file(tmp_path / "consolidated.safetensors") | {name: torch.zeros(128)}
        forms.save_file(weights, tmp_path / "consolidated.safetensors")
    else:
        shutil.copy(folder / "gguf/mmproj-f32.gguf", tmp_path)
        more = {name: torch.zeros(128)}
        forms.gguf_text(folder / "hf", tmp_path / "m.gguf", edit=lambda writer: forms.add_tensors(writer, more))
    with pytest.raises(TensorsUnexpected, match=name.replace(".", r"\.")):
        load(tmp_path)


def test_a_gguf_that_lacks_a_tensor_says_which(models, tmp_path):
    forms.gguf_text(models[0] / "hf", tmp_path / "m.gguf", without="blk.2.ffn_down.weight")
    with pytest.raises(TensorsMissing, match=r"layers\.2\.mlp\.down_proj"):
        load(tmp_path)


def test_scaled_rotary_frequencies_are_refused_and_ones_are_dropped(models, tmp_path):
    for name, factor in (("ones", 1.0), ("scaled", 8.0)):
        table = {"rope_freqs.weight": torch.tensor([1.0] * 7 + [factor])}
        forms.gguf_text(
            models[0] / "hf", tmp_path / f"{name}.gguf", edit=lambda writer, t=table: forms.add_tensors(writer, t)
        )
    assert "rope_freqs.weight" not in checkpoint.open(tmp_path / "ones.gguf").tensors
    with pytest.raises(ModelUnsupported, match="rope_freqs"):
        checkpoint.open(tmp_path / "scaled.gguf")


def test_a_k_quant_gguf_keeps_its_bytes_and_its_answers_through_a_serialized_file(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    builders.mistral(tmp_path / "hf", **sizes)
    builders.add_processor(tmp_path / "hf")
    forms.gguf_text(tmp_path / "hf", tmp_path / "model.gguf", k_quant)
    model = Pixtral.load(tmp_path / "model.gguf", devices="cpu")
    model.save(tmp_path / "model.pixtral")
    again = Pixtral.load(serialized_model_path=tmp_path / "model.pixtral", devices="cpu")
    stored, saved = model.source.checkpoint, again.source.checkpoint
    packed = [name for name, info in stored.tensors.items() if info.encoding in ("q4_k", "q6_k", "q8_0")]
    assert len(packed) == 2 * 7 + 2
    for name in packed:
        assert saved.tensors[name].encoding == stored.tensors[name].encoding
        assert saved.weight(name).rows.equal(stored.weight(name).rows), name
    first, second = (each.chat(CONVERSATIONS["text"], logprobs=5, **OPTIONS) for each in (model, again))
    assert (second.token_ids, second.logprobs) == (first.token_ids, first.logprobs)


# --- files that were named: the header decides


@pytest.mark.parametrize(
    ("text", "pictures"),
    [("model.gguf", "clip-vision.gguf"), ("model", "vision"), ("sha256-1", "sha256-2"), ("mmproj-not.gguf", "a.bin")],
)
def test_of_named_ggufs_the_header_says_which_is_which(models, tmp_path, text, pictures):
    folder, _, _ = models
    text = shutil.copy(folder / "gguf/model-f32.gguf", tmp_path / text)
    pictures = shutil.copy(folder / "gguf/mmproj-f32.gguf", tmp_path / pictures)
    expected = load(folder / "hf").chat(CONVERSATIONS["picture"], **OPTIONS).token_ids
    for path, weights in ((text, [pictures]), (pictures, [text]), (None, [text, pictures]), (None, [pictures, text])):
        ours = load(path, weight_paths=weights)
        assert ours.source.checkpoint.folder == text
        assert ours.chat(CONVERSATIONS["picture"], **OPTIONS).token_ids == expected


def test_in_a_folder_a_picture_part_is_known_by_its_header_too(models, tmp_path):
    shutil.copy(models[0] / "gguf/model-f32.gguf", tmp_path / "model.gguf")
    shutil.copy(models[0] / "gguf/mmproj-f32.gguf", tmp_path / "clip-vision.gguf")
    assert "vision_config" in checkpoint.open(tmp_path).config


def test_weights_for_a_folders_config_need_no_ending(models, tmp_path):
    folder, _, _ = models
    for source in ("hf/model.safetensors", "gguf/model-f32.gguf"):
        weights = shutil.copy(folder / source, tmp_path / "blob")
        more = [folder / "gguf/mmproj-f32.gguf"] if "gguf" in source else []
        opened = checkpoint.open(folder / "hf", [weights, *more])
        assert opened.tensors.keys() == checkpoint.open(folder / "hf").tensors.keys()


def test_a_pickle_is_known_by_its_header_and_not_opened(models, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(PickleRefused):
        checkpoint.open(models[0] / "hf", [tmp_path / "model.safetensors"]).tensors  # noqa: B018


def test_two_named_text_models_are_refused_by_name(models, tmp_path):
    text = models[0] / "gguf/model-f32.gguf"
    other = shutil.copy(text, tmp_path / "other")
    with pytest.raises(WeightsNotFound, match=r"model-f32\.gguf, other"):
        checkpoint.open(text, [other])
