"""A checkpoint's side files become a Processor; raw prompts; nothing imports torch before pixels are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from support.tool_builders import numbered_tekken
from transformers import PreTrainedTokenizerFast

from pixtral_cli.prompt.errors import (
    ImageNotFound,
    ImagesMisplaced,
    ImagesUnsupported,
    NoChatTemplate,
    PromptError,
)
from pixtral_cli.prompt.image import ImageSpec
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.processor import ImageTokens, Processor
from pixtral_cli.prompt.side_file import SideFile, SideFileUnreadable

SMALL = Image.new("RGB", (20, 40), "red")
SMALL_IDS = [10, 10, 12, 10, 10, 12, 10, 10, 13]
HELLO = parse([{"role": "user", "content": "a"}])
SEEING = parse([{"role": "user", "content": [{"type": "image", "image": SMALL}]}])


@pytest.fixture
def raw(checkpoint, byte_level_json) -> Processor:
    return Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json))


def test_a_single_image_need_not_be_in_a_list(raw, tmp_path):
    SMALL.save(tmp_path / "a.png")
    for one in (SMALL, str(tmp_path / "a.png"), tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        assert raw.complete("a", one).token_ids == raw.complete("a", [SMALL]).token_ids


@pytest.mark.parametrize("arguments", [(None,), (5,), (b"a",), ("a", 5), ("a", None), ("a", [None]), ("a", [5])])
def test_what_cannot_be_completed_is_one_sentence(raw, arguments):
    with pytest.raises(PromptError) as caught:
        raw.complete(*arguments)
    assert caught.value.hint


def test_an_answer_starts_a_text_in_a_chat_and_continues_one_without(raw):
    assert raw.chat(HELLO).answer_starts_text and raw.complete("").answer_starts_text
    assert not raw.complete("a").answer_starts_text and not raw.complete("", [SMALL]).answer_starts_text


def test_raw_text_follows_bos_and_nothing_else(raw):
    assert raw.complete("a red").token_ids == [1, *raw.tokenizer.encode("a red")]


def test_raw_images_come_first(raw):
    prompt = raw.complete(" square", [SMALL, SMALL])
    assert prompt.token_ids == [1, *SMALL_IDS, *SMALL_IDS, *raw.tokenizer.encode(" square")]
    assert prompt.image_tokens == 2 * len(SMALL_IDS)


def test_raw_images_take_the_places_of_their_marks(raw):
    prompt = raw.complete("a[IMG] b[IMG]", [SMALL, SMALL])
    a, b = raw.tokenizer.encode("a"), raw.tokenizer.encode(" b")
    assert prompt.token_ids == [1, *a, *SMALL_IDS, *b, *SMALL_IDS]


@pytest.mark.parametrize("images", [1, 3])
def test_marks_and_images_that_do_not_match_are_one_sentence(raw, images):
    with pytest.raises(ImagesMisplaced, match=f"2 .*{images}"):
        raw.complete("[IMG][IMG]", [SMALL] * images)


def test_raw_text_after_an_image_is_encoded_as_the_tokenizers_library_does(checkpoint, sentencepiece_json):
    made = Processor.from_checkpoint(checkpoint(tokenizer_json=sentencepiece_json))
    whole = tokenizers.Tokenizer.from_file(str(sentencepiece_json))
    theirs = whole.encode("[IMG_END]a red").ids
    assert made.complete("a red", [SMALL]).token_ids == [1, *SMALL_IDS[:-1], *theirs[1:]]


RAW = ["[INST]hi[/INST]", "<s>[INST] a red [/INST] a</s>", "a [INST]", "</s>", " <s>a", "[INST", "[IMG_BREAK] a", "a\n"]


def transformers_ids(path, text):
    ids = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")(text).input_ids
    return ids[1:] if ids[:2] == [1, 1] else ids  # a leading <s> is never doubled


@pytest.mark.parametrize("text", [*RAW, ""])
def test_raw_control_strings_are_control_tokens_as_in_transformers(raw, byte_level_json, text):
    assert raw.complete(text).token_ids == transformers_ids(byte_level_json, text)


@pytest.mark.parametrize("text", RAW)
def test_raw_control_strings_are_control_tokens_beside_sentencepiece_text(checkpoint, sentencepiece_json, text):
    made = Processor.from_checkpoint(checkpoint(tokenizer_json=sentencepiece_json))
    assert made.complete(text).token_ids == transformers_ids(sentencepiece_json, text)


def test_an_image_mark_without_images_is_text(raw):
    ids = raw.complete("[INST]a [IMG] b[/INST]").token_ids
    assert ids == [1, 3, *raw.tokenizer.encode("a [IMG] b"), 4] and 10 not in ids


def test_raw_control_strings_beside_images_are_control_tokens(raw):
    ids = raw.complete("<s>[INST]a[IMG][/INST]", [SMALL]).token_ids
    assert ids == [1, 3, *raw.tokenizer.encode("a"), *SMALL_IDS, 4]


def test_a_raw_prompt_and_a_chat_can_ask_the_same(raw):
    assert raw.complete("[INST]a[/INST]").token_ids == raw.chat(HELLO).token_ids


def test_the_answer_to_a_text_that_is_continued_is_the_middle_of_one(raw):
    for said, starts in (("", True), ("It is", False)):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
        assert raw.chat(parse(turns)).answer_starts_text is starts


@pytest.mark.parametrize("blank", ["", " \n", "\ufeff"])
def test_a_blank_template_is_none(checkpoint, byte_level_json, raw, blank):
    made = Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json, chat_template_jinja=blank))
    assert made.chat(HELLO).token_ids == raw.chat(HELLO).token_ids


def test_a_byte_order_mark_before_side_files_is_passed_over(checkpoint, byte_level_json, tmp_path):
    written = {
        "tokenizer_json": byte_level_json.read_text(),
        "tokenizer_config_json": '{"chat_template": "{{ messages[0].content }}a"}',
        "processor_config_json": '{"image_token": "[TOOL_RESULTS]"}',
        "preprocessor_config_json": '{"size": {"longest_edge": 320}}',
        "chat_template_json": '{"chat_template": "\ufeff{{ messages[0].content }}b"}',
        "chat_template_jinja": "{{ messages[0].content }}c",
    }
    marked = {name: "\ufeff" + text for name, text in written.items()}
    for name in ("none", "chat_template_jinja", "chat_template_json"):
        written.pop(name, None), marked.pop(name, None)
        plain, made = (Processor.from_checkpoint(checkpoint(**files)) for files in (written, marked))
        assert made.chat(HELLO).token_ids == plain.chat(HELLO).token_ids
        assert (made.image_tokens, made.spec) == (plain.image_tokens, plain.spec) != (raw_tokens(plain), ImageSpec())


def raw_tokens(made):
    return ImageTokens.of(made.tokenizer, SideFile())


def test_an_hf_folder_without_a_template_follows_mistrals_rules(raw):
    assert isinstance(raw.chat_format, MistralFormat)
    assert raw.chat(HELLO).token_ids == [1, 3, *raw.tokenizer.encode("a"), 4]


def test_a_model_without_template_and_control_tokens_has_no_chat(checkpoint, tmp_path):
    (tmp_path / "t.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    made = Processor.from_checkpoint(checkpoint(tokenizer_json=tmp_path / "t.json"))
    assert made.complete("a").token_ids == [0]
    with pytest.raises(NoChatTemplate) as caught:
        made.chat(HELLO)
    assert "--raw" in caught.value.hint


def test_a_model_without_image_tokens_refuses_images(checkpoint, byte_level_json):
    made = Processor.from_checkpoint(
        checkpoint(tokenizer_json=byte_level_json, processor_config_json='{"image_token": "[NONE]"}')
    )
    for ask in (lambda: made.chat(SEEING), lambda: made.complete("", [SMALL])):
        with pytest.raises(ImagesUnsupported):
            ask()


def test_image_token_names_come_from_the_processor_config(checkpoint, byte_level_json):
    names = {"image_token": {"content": "[TOOL_RESULTS]"}, "image_break_token": "<pad>", "image_end_token": "[/INST]"}
    files = {"tokenizer_json": byte_level_json, "processor_config_json": json.dumps(names)}
    made = Processor.from_checkpoint(checkpoint(**files))
    assert made.complete("", [SMALL]).token_ids == [1, 7, 7, 11, 7, 7, 11, 7, 7, 4]


def test_the_recipe_follows_the_form_unless_chosen(checkpoint, byte_level_json):
    made = [
        Processor.from_checkpoint(checkpoint(form, tokenizer_json=byte_level_json), image_preprocessing=choice).recipe
        for form, choice in (("hf", None), ("native", None), ("hf", "native"), ("native", "hf"))
    ]
    assert made == ["hf", "native", "native", "hf"]


def test_an_unknown_recipe_is_one_sentence(checkpoint, byte_level_json):
    with pytest.raises(PromptError, match="'best'"):
        Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json), image_preprocessing="best")


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config_json": '{"size": {"longest_edge": 320}}'},
        {"processor_config_json": '{"image_processor": {"size": {"longest_edge": 320}}}'},
    ],
)
def test_the_longest_side_comes_from_the_preprocessor(checkpoint, byte_level_json, files):
    made = Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json, **files))
    (image,) = made.complete("", [Image.new("RGB", (1000, 500))]).images
    assert (image.width, image.height) == (320, 160)


def test_merged_patches_make_fewer_tokens(checkpoint, byte_level_json):
    made = Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json), spec=ImageSpec(28))
    (image,) = made.complete("", [Image.new("RGB", (100, 50))]).images
    assert (image.width, image.height, image.rows, image.columns) == (112, 56, 2, 4)


@pytest.mark.parametrize("version", [7, 11, 13])
def test_prompt_and_pixels_of_a_native_mistral_3_are_those_of_mistral_common(
    tekken_file, tmp_path, checkpoint, version
):
    """A file has the limits of pictures under `multimodal`, which counts where both are there, or `image`."""
    path = numbered_tekken(tekken_file, tmp_path, version)
    data = json.loads(path.read_bytes())
    limits = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    path.write_text(json.dumps(data | {"image" if version > 11 else "multimodal": limits}))
    pictures = [SMALL, Image.new("RGB", (1700, 30), "blue"), Image.new("RGB", (4000, 10)), Image.new("RGB", (57, 56))]
    content = [ImageChunk(image=picture) for picture in pictures]
    request = ChatCompletionRequest(messages=[UserMessage(content=[*content, TextChunk(text="What?")])])
    theirs = MistralTokenizer.from_file(str(path)).encode_chat_completion(request)
    made = Processor.from_checkpoint(checkpoint("native", tekken_json=path), spec=ImageSpec(28, 900))
    parts = [{"type": "image", "image": picture} for picture in pictures]
    prompt = made.chat(parse([{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]))
    assert prompt.token_ids == theirs.tokens
    for ours, expected in zip(prompt.images, theirs.images, strict=True):
        assert np.allclose(ours.pixels(), expected, atol=0.01)


def test_an_image_that_fails_is_named(raw):
    with pytest.raises(ImageNotFound, match=r"missing\.png"):
        raw.complete("a", ["missing.png"])


def test_images_are_opened_by_the_function_given(checkpoint, byte_level_json):
    seen = []
    made = Processor.from_checkpoint(
        checkpoint(tokenizer_json=byte_level_json),
        open_image=lambda source: nullcontext(seen.append(source) or SMALL),
    )
    made.complete("", ["somewhere"])
    assert seen == ["somewhere"]


@pytest.mark.parametrize("name", ["tokenizer_config_json", "processor_config_json", "preprocessor_config_json"])
def test_a_damaged_side_file_is_one_sentence(checkpoint, byte_level_json, name):
    with pytest.raises(SideFileUnreadable, match="Cannot read"):
        Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json, **{name: "{"}))


def test_prompts_and_their_sizes_need_no_torch(byte_level_json, tmp_path):
    SMALL.save(tmp_path / "a.png")
    code = f"""
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.processor import Processor
files = {{"tokenizer.json": Path({str(byte_level_json)!r})}}
made = Processor.from_checkpoint(SimpleNamespace(form="hf", file=files.get, written_tokenizer=None))
image = {{"type": "image", "url": {str(tmp_path / "a.png")!r}}}
prompt = made.chat(parse([{{"role": "user", "content": [image, "a"]}}]))
assert prompt.images[0].tokens == {len(SMALL_IDS)}
heavy = {{"torch", "transformers", "numpy"}} & sys.modules.keys()
assert not heavy, heavy
prompt.images[0].pixels()
assert "torch" in sys.modules
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


DAMAGED = [
    ("preprocessor_config", "size", '"big"'),
    ("preprocessor_config", "size", "[1]"),
    ("preprocessor_config", "longest_edge in size", '{"longest_edge": "x"}'),
    ("preprocessor_config", "longest_edge in size", '{"longest_edge": -5}'),
    ("preprocessor_config", "image_mean", "5"),
    ("preprocessor_config", "image_mean", "[1]"),
    ("preprocessor_config", "image_mean", '["a", "b", "c"]'),
    ("preprocessor_config", "image_std", "[0, 0, 0]"),
    ("preprocessor_config", "rescale_factor", '"x"'),
    ("preprocessor_config", "do_normalize", '"no"'),
    ("processor_config", "image_processor", "[]"),
    ("processor_config", "image_processor", "5"),
    ("processor_config", "image_token", "5"),
    ("tokenizer_config", "eos_token", '["x"]'),
    ("tokenizer_config", "bos_token", '{"content": ["a"]}'),
]


@pytest.mark.parametrize(("file", "key", "value"), DAMAGED)
def test_a_setting_that_cannot_be_meant_names_file_and_key(checkpoint, byte_level_json, file, key, value):
    written = f'{{"{key.rpartition(" ")[2]}": {value}}}'
    with pytest.raises(SideFileUnreadable) as caught:
        Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json, **{f"{file}_json": written}))
    assert str(caught.value).startswith(f"{key} in ") and f"{file}.json" in str(caught.value)
    assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", "{", "\x00", "[" * 100_000])
def test_settings_that_are_no_object_name_their_file(checkpoint, byte_level_json, content):
    with pytest.raises(SideFileUnreadable, match=r"preprocessor_config\.json") as caught:
        Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json, preprocessor_config_json=content))
    assert caught.value.hint


def test_settings_that_are_null_are_the_defaults(checkpoint, byte_level_json):
    nothing = '{"size": null, "image_mean": null, "image_std": null, "rescale_factor": null, "do_rescale": null}'
    made = Processor.from_checkpoint(checkpoint(tokenizer_json=byte_level_json, preprocessor_config_json=nothing))
    assert made.spec == ImageSpec()


def test_every_kind_of_prompt_error_has_a_next_step_by_default():
    kinds = [PromptError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert len(kinds) > 10 and [kind for kind in kinds if not kind.default_hint] == []
