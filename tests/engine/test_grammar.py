"""What a grammar lets through is JSON by its schema, whatever the model prefers; what cannot be kept to is refused."""

from __future__ import annotations

import json
import random
import re
import time

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import choose

from pixtral_cli.engine import grammar
from pixtral_cli.engine.request import Sampling
from pixtral_cli.errors import RequestError

END, CALL, OTHER = 0, 1, 2
PIECES = [b'{"', b'":', b'", "', b'"}', b"}}", b": ", b", ", b"\n", b"\n\n\n", b"    ", b"true", b"red", b"12", b"]}"]
PIECES += [b"\xc3", b"\xa9x", "é".encode(), "é何".encode(), b"\xe4\xbd", b"\x95", b'\xe4\xbd\x95"', b"\xf0\x9f"]
TOKENS = [b"", b"", b"", *(bytes([n]) for n in range(256)), *PIECES]
SIZE = len(TOKENS)


def encode(text):
    """The longest piece first, as a tokenizer might."""
    ids, data = [], text.encode()
    while data:
        token = max((t for t in TOKENS if t and data.startswith(t)), key=len)
        ids.append(len(TOKENS) - 1 - TOKENS[::-1].index(token))
        data = data[len(token) :]
    return ids


def ids_of(mask):
    return mask.nonzero().flatten().tolist()


@pytest.fixture(scope="module")
def vocabulary():
    return grammar.Vocabulary(SIZE, TOKENS.__getitem__, encode, {END}, {CALL, OTHER})


def constraint(vocabulary, schema, subject="response_format"):
    grammar.check_schemas([schema], subject)
    return grammar.compile(vocabulary, f"start: {grammar.json_rule(schema)}", subject)


def written(constraint, seed, most=4000, padding=40):
    """What a model of random scores writes; after a while it would rather end than go on."""
    generator = torch.Generator().manual_seed(seed)
    sampling, ids = Sampling(temperature=1.0, top_k=0), []
    while len(ids) < most:
        logits = torch.randn(SIZE + padding, generator=generator) * 3
        if len(ids) > 60:
            logits[[END, *(TOKENS.index(mark) for mark in (b'"', b"}", b"]"))]] += 12
        ids.append(choose(logits, sampling, [], ids, generator, constraint))
        constraint.accept(ids[-1])
        if ids[-1] == END:
            return b"".join(TOKENS[id] for id in ids)
    raise AssertionError(f"no end after {most} tokens")


def text_of(data):
    """Every sequence of tokens that is let through is UTF-8."""
    return data.decode()


def integers(low, more):
    return {"type": "integer", "minimum": low, "maximum": low + more}


def strings(low, more):
    return {"type": "string", "minLength": low, "maxLength": low + more}


fixed = [
    {"type": "boolean"},
    {"type": ["null", "boolean"]},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "string", "pattern": "^[a-f]{2,4}(-[0-9]{2})?$"},
    {"type": "string", "format": "date"},
    *({"const": value} for value in ("x", 3, None, True, "é何", {"a": [1]})),
]
leaves = st.one_of(
    st.sampled_from(fixed),
    st.builds(integers, st.integers(-20, 20), st.integers(0, 300)),
    st.builds(strings, st.integers(0, 4), st.integers(0, 5)),
    st.lists(st.text('aé"\\何\n', max_size=3) | st.integers(0, 9), min_size=1, max_size=4).map(lambda v: {"enum": v}),
)


def combined(inner):
    def of_properties(properties, closed, some):
        required = sorted(properties)[: len(properties) if some else 1]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": closed}

    def of_items(items, low, more):
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}

    names = st.sampled_from(["a", "b", "ké", 'q"x', "long_name"])
    return st.one_of(
        st.builds(of_properties, st.dictionaries(names, inner, max_size=3), st.just(False), st.booleans()),
        st.builds(of_items, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda ways: {"anyOf": ways}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda schema: {"$ref": "#/$defs/d", "$defs": {"d": schema}}, leaves),
    )


def without_inner_definitions(schema, top=True):
    """`$defs` have a meaning at the top only."""
    if isinstance(schema, dict):
        if not top and "$defs" in schema:
            return schema["$defs"]["d"]
        return {key: without_inner_definitions(value, False) for key, value in schema.items()}
    return [without_inner_definitions(value, False) for value in schema] if isinstance(schema, list) else schema


@given(schema=st.recursive(leaves, combined, max_leaves=6).map(without_inner_definitions), seed=st.integers(0, 2**30))
@settings(max_examples=150, deadline=None)
def test_whatever_the_model_prefers_it_writes_json_by_the_schema(vocabulary, schema, seed):
    jsonschema.validate(json.loads(text_of(written(constraint(vocabulary, schema), seed))), schema)


PARTS = {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}
TREE = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "parts": PARTS},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("schema", [{"type": "object"}, TREE])
def test_any_object_and_recursive_ones(vocabulary, schema, seed):
    value = json.loads(text_of(written(constraint(vocabulary, schema), seed)))
    assert isinstance(value, dict)
    jsonschema.validate(value, schema)


@pytest.mark.parametrize("seed", range(20))
def test_characters_of_several_tokens_are_whole(vocabulary, seed):
    text = json.loads(text_of(written(constraint(vocabulary, strings(20, 10)), seed)))
    assert 20 <= len(text) <= 30


def blankest(constraint, most=400):
    """What a model writes that puts white space wherever it may, and else ends what it can."""
    data = b""
    for _ in range(most):
        allowed = ids_of(constraint.mask())
        blank = [id for id in allowed if TOKENS[id] and not TOKENS[id].strip()]
        closing = [id for id in allowed if id == END or TOKENS[id][:1] in (b"}", b"]", b'"')]
        id = (blank or closing or allowed)[-1]
        constraint.accept(id)
        if id == END:
            return data
        data += TOKENS[id]
    raise AssertionError(f"it never ends: {data[:200]!r}")


def test_a_model_that_wants_nothing_but_white_space_comes_to_an_end(vocabulary):
    nulls = {"type": "array", "items": {"type": "null"}, "maxItems": 3}
    schema = {"type": "object", "properties": {"a": nulls}, "required": ["a"], "additionalProperties": False}
    data = blankest(constraint(vocabulary, schema))
    jsonschema.validate(json.loads(data), schema)
    assert max(map(len, re.findall(rb"\s+", data))) <= 21 and b"\n\n" not in data and not data[:1].isspace()


def test_after_the_grammar_nothing_but_the_end_may_follow(vocabulary):
    bound = constraint(vocabulary, {"const": "red"})
    for token in (b'"', b"red", b'"'):
        assert not bound.finished
        bound.accept(TOKENS.index(token))
    assert bound.finished and ids_of(bound.mask()) == [END]
    for _ in range(3):  # an engine that ignores the end of an answer
        bound.accept(END)
        assert ids_of(bound.mask()) == [END]


def test_each_answer_has_a_constraint_of_its_own(vocabulary):
    first = constraint(vocabulary, {"enum": ["red", "12"]})
    first.accept(TOKENS.index(b'"'))
    second = first.fresh()
    first.accept(TOKENS.index(b"12"))
    assert second.mask()[TOKENS.index(b'"')] and not second.mask()[TOKENS.index(b"red")]
    assert ids_of(first.mask()) == [TOKENS.index(b'"')]


def test_a_constraint_may_sleep_until_a_token_begins_it(vocabulary):
    bound = grammar.compile(vocabulary, f'start: <[{CALL}]> "red"', "tools", starts_at=CALL)
    for id in (5, OTHER, 200):
        assert bound.mask() is None and not bound.finished
        bound.accept(id)
    bound.accept(CALL)
    assert bound.mask()[TOKENS.index(b"red")] and not bound.mask()[[END, CALL, OTHER, TOKENS.index(b"1")]].any()
    assert bound.fresh().mask() is None


def test_control_tokens_are_never_text(vocabulary):
    bound = constraint(vocabulary, {"type": "string"})
    bound.accept(TOKENS.index(b'"'))
    assert not bound.mask()[[END, CALL, OTHER]].any()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "http://192.0.2.1/schema.json"}, "192.0.2.1"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "pattern": r"(a)\1"}, "regex"),
        ({"type": "string", "allOf": [{"type": "integer"}]}, "incompatible"),
        ({"$ref": "#"}, "nothing"),
        ({"multipleOf": float("nan")}, "nan"),
        ({"multipleOf": -1}, "-1"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_and_named(vocabulary, schema, named):
    with pytest.raises(RequestError, match=f"^response_format .*{named}") as caught:
        constraint(vocabulary, schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_model_that_nothing_ends_cannot_be_bound():
    endless = grammar.Vocabulary(SIZE, TOKENS.__getitem__, encode, set(), {CALL})
    with pytest.raises(RequestError, match="nothing ends"):
        constraint(endless, {"type": "object"})


def chain(length, more=1):
    definitions = {
        f"d{n}": {"type": "object", "properties": {f"a{m}": {"$ref": f"#/$defs/d{n + 1}"} for m in range(more)}}
        for n in range(length)
    }
    return {"$defs": definitions | {f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def nested(depth, wrap):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


BOMBS = {
    "a long chain of references": chain(1500),
    "a chain that crashes without a limit": chain(20_000),
    "references that double": chain(40, 2),
    "deep nesting": nested(5000, lambda inner: {"type": "array", "items": inner}),
    "arrays of arrays": nested(8, lambda inner: {"type": "array", "items": inner, "minItems": 1000, "maxItems": 1000}),
    "alternatives of alternatives": nested(6, lambda inner: {"anyOf": [inner] * 6}),
    "all of any": {"allOf": [{"anyOf": [{"maxLength": n}, {"minLength": n}]} for n in range(30)]},
    "a large multiple": {"type": "integer", "multipleOf": 9999999},
    "multiples of each other": {"allOf": [{"type": "integer", "multipleOf": n} for n in (997, 991, 983)]},
    "a huge enumeration": {"enum": [f"value {n}" for n in range(100_000)]},
    "a huge constant": {"const": "x" * 10**6},
    "many properties": {"type": "object", "properties": {f"p{n}": {"pattern": "^[a-z]{1,50}$"} for n in range(20_000)}},
    "nested repetitions": {"type": "string", "pattern": "((((a{1,500}){1,500}){1,500}){1,500})b"},
    "an exponential automaton": {"type": "string", "pattern": "^(a|b)*a(a|b){40}$"},
    "a long repetition": {"type": "string", "pattern": ".*a.{30000}b"},
    "impossible lengths": {"type": "string", "minLength": 10**12},
    "a huge array": {"type": "array", "minItems": 10**15},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_schema_that_would_take_all_time_or_memory_ends_within_the_limit(vocabulary, name):
    vocabulary.tokenizer  # noqa: B018  made before the clock runs
    begun = time.monotonic()
    pick = random.Random(0)
    try:
        bound = constraint(vocabulary, BOMBS[name])
        for _ in range(20):
            bound.accept(pick.choice(ids_of(bound.mask())))
    except RequestError as error:
        assert len(str(error)) < 500
    assert time.monotonic() - begun < 2 * grammar.SECONDS
