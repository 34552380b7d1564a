"""Tool calls for tests, and mistral-common's rules of each version, which are the oracle for the ids of prompts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import mistral_common
from hypothesis import strategies as st
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV3,
    InstructTokenizerV7,
    InstructTokenizerV11,
    InstructTokenizerV13,
)
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor

DATA = Path(mistral_common.__file__).parent / "data"
EFFORTS = ("none", "high")
SETTINGS = {
    "reasoning_effort": {"type": "enum", "accepts_none": True, "values": EFFORTS, "default": "none"},
    "json_schema": {"type": "json_schema", "accepts_none": False},
}
KINDS = {
    3: (TokenizerVersion.v3, InstructTokenizerV3),
    7: (TokenizerVersion.v7, InstructTokenizerV7),
    11: (TokenizerVersion.v11, InstructTokenizerV11),
    13: (TokenizerVersion.v13, InstructTokenizerV13),
}


def mistral_request(messages, tools=()):
    """OpenAI-style messages (or mistral-common's own) and tools, as mistral-common takes them."""
    return ChatCompletionRequest(messages=messages, tools=[Tool.from_openai(tool) for tool in tools] or None)


def mistral_ids(tokenizer, version, messages, tools=(), images=None):
    """What mistral-common's rules of that version make of a conversation; `images` is its encoder of images."""
    name, rules = KINDS[version]
    request = get_normalizer(name).from_chat_completion_request(mistral_request(messages, tools))
    return rules(tokenizer, images).encode_instruct(request).tokens


def later_tekken(tekken_file, folder, version, *controls, **settings):
    """A file with Pixtral's vocabulary, that version of the rules, and more control tokens."""
    data = json.loads(tekken_file.read_bytes())
    names = [token["token_str"] for token in data.get("special_tokens") or Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    listed = [{"rank": n, "token_str": name, "is_control": True} for n, name in enumerate((*names, *controls))]
    data |= {"special_tokens": listed, "config": data["config"] | {"version": version}, **settings}
    path = folder / "tekken.json"
    path.write_text(json.dumps(data))
    return path


@cache
def sentencepiece_metadata(name):
    """A GGUF's metadata of one of mistral-common's SentencePiece vocabularies."""
    model = SentencePieceProcessor(model_file=str(DATA / name))
    ids = range(model.vocab_size())
    kinds = ((model.IsUnknown, 2), (model.IsControl, 3), (model.IsUnused, 5), (model.IsByte, 6))
    return {
        "model": "llama",
        "tokens": [model.id_to_piece(id) for id in ids],
        "scores": [model.get_score(id) for id in ids],
        "token_type": [next((number for test, number in kinds if test(id)), 1) for id in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def numbered_tekken(tekken_file, folder, version):
    """A file of that version with Pixtral's vocabulary and all of mistral-common's control tokens of that version."""
    older = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    later = [str(name) for name in SpecialTokens if name not in older]
    since = {7: later[:2], 11: later[:2], 13: [*later[:2], "[THINK]", "[/THINK]"], 15: later}
    more = {"model_settings_builder": SETTINGS} if version == 15 else {}
    path = later_tekken(tekken_file, folder, f"v{version}", *since.get(version, ()), **more)
    data = json.loads(path.read_bytes())
    if version > 11 and "multimodal" in data:
        data["image"] = data.pop("multimodal")
    path.write_text(json.dumps(data))
    return path


def call(id, name="add", arguments='{"a": 1}'):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a[INST]</s> \n"é', max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab [", max_size=4), inner, max_size=2),
    max_leaves=4,
)

arguments = st.dictionaries(st.text("ab", max_size=2), json_values, max_size=2)
