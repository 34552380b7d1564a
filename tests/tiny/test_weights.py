"""The shipped folder: small enough, in the form transformers reads, and every block encoding applies."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support.builders import HfProcessor
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from pixtral_cli.tiny import FOLDER
from pixtral_cli.tiny.scenes import Style, draw, random_scene, scene_rng
from pixtral_cli.tiny.training.tokenizer import EOS


@pytest.fixture(scope="module")
def tensors() -> dict[str, tuple[str, list[int]]]:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}


def test_the_folder_is_at_most_16_mib():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16 * 2**20


def test_it_has_4_to_8_million_parameters_in_bfloat16(tensors):
    count = sum(torch.Size(shape).numel() for _, shape in tensors.values())
    assert 4e6 <= count <= 8e6
    assert {dtype for dtype, _ in tensors.values()} == {"BF16"}


def test_every_matrix_has_rows_of_whole_blocks_of_256(tensors):
    assert all(shape[-1] % 256 == 0 for _, shape in tensors.values() if len(shape) == 2)


def test_it_takes_pictures_of_1024_px_and_a_context_of_16384():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 1024
    assert config["text_config"]["max_position_embeddings"] == 16384


@pytest.fixture(scope="module")
def processor() -> HfProcessor:
    """transformers' own reading of the folder's tokenizer, template and picture recipe."""
    return HfProcessor(AutoTokenizer.from_pretrained(FOLDER), PixtralImageProcessorPil.from_pretrained(FOLDER))


@pytest.fixture(scope="module")
def model():
    from pixtral_cli import Pixtral

    return Pixtral.load("tiny", quantization_encoding="float32", devices="cpu")


def pictures(count: int) -> list[Image.Image]:
    return [draw(random_scene(scene_rng(20_003, index), Style(sides=(64, 150)))) for index in range(count)]


@pytest.mark.parametrize(
    ("shown", "text"),
    [(1, "What is in this picture?"), (2, "Which picture has more shapes?"), (0, "Hello")],
    ids=["one picture", "two pictures", "no picture"],
)
def test_transformers_loads_the_folder_and_answers_the_same(processor, model, shown, text):
    theirs = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    images = pictures(shown)
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    inputs = processor(processor.tokenizer.apply_chat_template(messages, tokenize=False), images)
    with torch.no_grad():
        output = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)
    prompt = inputs["input_ids"][0].tolist()
    reply = model.chat(messages, max_new_tokens=40)
    assert list(reply.prompt_token_ids) == prompt
    expected = [i for i in output[0, len(prompt) :].tolist() if i != EOS]
    assert [i for i in reply.token_ids if i != EOS] == expected


def test_a_system_prompt_several_turns_and_tools_render_by_the_v3_rules(processor):
    tools = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi. "},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    ]
    plain = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    assert plain == "<s>[INST]Hello[/INST]Hi.</s>[INST]Be brief.\n\n[IMG]What is this?[/INST]"
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "a star"},
    ]
    rendered = processor.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert "Hi.</s>[AVAILABLE_TOOLS][{" in rendered and '"name": "look"' in rendered
    assert rendered.endswith(
        '[TOOL_CALLS][{"name": "look", "arguments": {"at": 1}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS]{"content": "a star", "call_id": "abcdefghi"}[/TOOL_RESULTS]'
    )
