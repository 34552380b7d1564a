"""What an answer is bound to lies within the client's schema, without what grammars refuse or would write twice."""

import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from pixtral_cli.engine.grammar import json_rule
from pixtral_cli.engine.schema import FORMATS, bound


class Bytes:
    """A vocabulary of single bytes."""

    bos_token_id, eos_token_id, special_token_ids = None, 0, (0,)
    tokens = (b"<0>", *(bytes([byte]) for byte in range(256)))

    def __call__(self, data):
        return [byte + 1 for byte in data]


@pytest.fixture(scope="module")
def allows():
    """(schema, value or its JSON text) -> whether a grammar of that schema lets it be written."""
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=257, eos_token=[0])

    def ask(schema, value):
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(f"start: {json_rule(schema)}"), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        return matcher.try_consume_tokens(Bytes()(data)) == len(data) and matcher.is_accepting()

    return ask


A, B = {"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}
REF_A = {"$ref": "#/$defs/A"}


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_format_that_is_kept_is_one_that_grammars_know_and_keep_to(allows, format):
    schema = {"type": "string", "format": format}
    assert bound(schema) == schema
    assert not allows(schema, '"no @ such: thing"')


@pytest.mark.parametrize("format", ["password", "path", "byte", "binary", "int64", "idn-email", "iri", "uuid4", "x y"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"type": "object", "properties": {"v": s}, "required": ["v"]}])
def test_any_other_format_is_an_annotation(allows, format, wrap):
    schema = wrap({"type": "string", "format": format, "minLength": 2})
    good, short = ('{"v": "é/"}', '{"v": "a"}') if "properties" in schema else ('"é/"', '"a"')
    assert allows(schema, good) and not allows(schema, short)


def test_annotations_of_every_draft_and_of_openapi_are_passed_over(allows):
    said = {"title": "t", "description": "d", "examples": [1], "example": 1, "default": 1, "deprecated": True}
    said |= {"readOnly": True, "writeOnly": True, "contentEncoding": "base64", "contentMediaType": "text/plain"}
    said |= {"$comment": "c", "x-order": 3, "nullable": False, "discriminator": {"propertyName": "k"}}
    assert allows({"type": "integer", **said}, 5) and not allows({"type": "integer", **said}, '"5"')
    assert allows({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, [1, 1])


def test_a_property_that_is_called_format_stays_one():
    schema = {"properties": {"format": {"type": "string"}, "uniqueItems": False}, "additionalProperties": True}
    assert bound(schema) == schema


def test_an_object_that_lists_its_properties_has_no_others_and_none_twice(allows):
    for schema in (A, {"type": "object", **A}, {"$defs": {"A": A}, **REF_A}, {"anyOf": [A, B]}, {"allOf": [A]}):
        assert allows(schema, {"a": 1}) and allows(schema, {})
        for text in ('{"a": 1, "c": 2}', '{"a": 1, "a": 2}', '{"a": 1, "\\u0061": 2}', '{"a": "1"}'):
            assert not allows(schema, text)
    nested = {"type": "object", "properties": {"l": {"type": "array", "items": A}}}
    assert allows(nested, {"l": [{"a": 1}]}) and not allows(nested, {"l": [{"c": 1}]})
    none = {"type": "object", "properties": {}}
    assert allows(none, {}) and not allows(none, {"a": 1})


@pytest.mark.parametrize("more", [True, {}, {"type": "integer"}])
def test_additional_properties_are_as_the_schema_says(allows, more):
    assert allows({**A, "additionalProperties": more}, {"a": 1, "c": 2})
    assert allows({"type": "object"}, {"c": 2})
    assert allows({**A, "patternProperties": {"^x": {"type": "integer"}}}, {"a": 1, "x1": 2})


BOTH = {
    "all of": {"allOf": [A, B]},
    "properties beside a reference": {**B, **REF_A},
    "all of references": {"allOf": [REF_A, {"$ref": "#/$defs/B"}]},
    "any of beside properties": {**B, "anyOf": [A, {"properties": {"c": {}}}]},
    "any of beside what is required": {"anyOf": [A, {"properties": {"c": {}}}], "required": ["b"]},
    "all of within any of": {"anyOf": [{"type": "null"}, {"allOf": [REF_A, B]}]},
    "a reference to a reference": {"allOf": [{"$ref": "#/$defs/to%20A"}, B]},
    "what is required is not listed": {**A, "required": ["b"]},
    "more than are listed": {**A, "required": ["a"], "minProperties": 2},
}


@pytest.mark.parametrize("name", BOTH)
def test_schemas_that_describe_an_object_together_stay_open_for_each_other(allows, name):
    schema = {**BOTH[name], "$defs": {"A": A, "B": B, "to A": REF_A}}
    jsonschema.validate({"a": 1, "b": 2}, schema)
    assert allows(schema, {"a": 1, "b": 2}) or allows(schema, {"b": 2, "a": 1})


names = st.sampled_from(["a", "b", "c"])
leaf = st.sampled_from([{"type": "integer"}, {"type": "null"}, REF_A, {"$ref": "#/$defs/T"}])


def combined(inner):
    properties = st.dictionaries(names, inner, max_size=2)
    some = st.lists(inner, min_size=1, max_size=2)
    return st.fixed_dictionaries(
        {"properties": properties},
        optional={"required": st.lists(names, max_size=1), "anyOf": some, "allOf": some, "additionalProperties": inner},
    ) | st.sampled_from(["anyOf", "allOf"]).flatmap(lambda key: some.map(lambda ways: {key: ways}))


values = st.recursive(st.none() | st.integers(0, 2), lambda v: st.dictionaries(names, v, max_size=3), max_leaves=4)


@given(schema=st.recursive(leaf, combined, max_leaves=6), value=values)
@settings(max_examples=400, deadline=None)
def test_whatever_the_schema_what_is_left_of_it_allows_nothing_more(schema, value):
    schema = {**schema, "$defs": {"A": A, "T": {"type": "object", **B}}}
    left = bound(schema)
    jsonschema.Draft202012Validator.check_schema(left)
    if jsonschema.Draft202012Validator(left).is_valid(value):
        jsonschema.validate(value, schema)


def test_references_in_a_chain_take_no_time_that_grows_with_its_square():
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(4000)}
    schema = {"$defs": chain | {"d4000": A}, "allOf": [{"$ref": "#/$defs/d0"}, B]}
    assert "additionalProperties" not in bound(schema)["$defs"]["d4000"]
