"""The built-in model's tokenizer: bytes in, the same bytes out, and control ids where V3 has them."""

import json

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from pixtral_cli.tiny import FOLDER

TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
V3 = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def test_control_tokens_have_their_v3_ids():
    assert [TOKENIZER.id_to_token(i) for i in range(len(V3))] == V3


@given(st.text())
def test_every_text_is_encoded_and_decoded_without_loss(text):
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text or any(name in text for name in V3)


def test_each_of_the_256_bytes_is_a_token_of_its_own():
    ids = {TOKENIZER.token_to_id(character) for character in ByteLevel.alphabet()}
    assert None not in ids and len(ids) == 256


@given(st.text("ABCXYZ0123456789 ", min_size=1))
def test_capitals_and_digits_are_never_merged(text):
    assert [TOKENIZER.decode([i]) for i in encode(text)].count("") == 0
    assert sum(character != " " for character in text) == sum(TOKENIZER.decode([i]).strip() != "" for i in encode(text))


def test_a_context_of_16384_is_stated():
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 16384
