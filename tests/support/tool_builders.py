"""Tool calls for tests, and mistral-common's rules of each version, which are the oracle for how they are written."""

from __future__ import annotations

from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV3,
    InstructTokenizerV7,
    InstructTokenizerV11,
    InstructTokenizerV13,
)

KINDS = {
    3: (TokenizerVersion.v3, InstructTokenizerV3),
    7: (TokenizerVersion.v7, InstructTokenizerV7),
    11: (TokenizerVersion.v11, InstructTokenizerV11),
    13: (TokenizerVersion.v13, InstructTokenizerV13),
}


def call(id, name="add", arguments='{"a": 1}'):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a[INST]</s> \n"é', max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab [", max_size=4), inner, max_size=2),
    max_leaves=4,
)

arguments = st.dictionaries(st.text("ab", max_size=2), json_values, max_size=2)
