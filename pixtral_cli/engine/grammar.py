"""A grammar in, which tokens may come next out. Knows token ids and their bytes, no text models and no prompts.

Grammars are llguidance's: Lark with `%json` for JSON schemas and `<[id]>` for control tokens. The library is imported
when the first one is compiled.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pixtral_cli.engine.schema import bound
from pixtral_cli.errors import RequestError

WHITE_SPACE = r"(\n {0,20}|\n\t{0,8}| )?"
"""Between JSON's tokens: a space, or a line's end and an indentation. Unbounded, a model may write no end of it."""
MOST_NODES, MOST_LEVELS, MOST_TEXT, LONGEST_TEXT = 5_000, 64, 256 * 1024, 16 * 1024
"""Of all schemas of a request. llguidance walks a chain of references recursively: each node may take 10 KB of stack;
and at each step it goes through all the text that is forced."""
LARGEST_MULTIPLE = 100_000
"""A multiple of n takes an automaton of n states, and several a product: 10 million are 4 GB and 100 s."""
STACK, SECONDS = 128 * 2**20, 5.0
PREAMBLE = re.compile(r"^at \d+\(\d+\): |failed to compile JSON schema: |(?i:parser error: )")
_stack_size = threading.Lock()


class Vocabulary:
    """The tokens of one model; what llguidance needs of them is made when a grammar first asks, in half a second.

    Args:
        size: ids are below it.
        token_bytes: the bytes of an id; b"" for one that writes nothing.
        encode: the ids that the model's own tokenizer gives for the middle of a text.
        end_ids: what ends an answer.
        special_ids: control tokens, which only `<[id]>` stands for.
    """

    def __init__(
        self,
        size: int,
        token_bytes: Callable[[int], bytes],
        encode: Callable[[str], Sequence[int]],
        end_ids: Collection[int],
        special_ids: Collection[int],
    ) -> None:
        self.size, self.token_bytes, self.encode = size, token_bytes, encode
        self.end_ids, self.special_ids = frozenset(end_ids), frozenset(special_ids)
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        """llguidance's own."""
        with self._lock:
            return self._made

    @cached_property
    def _made(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokens = _Tokens(self)
        slices, ends = LLTokenizer.json_slices(), sorted(self.end_ids)
        made = LLTokenizer(TokenizerWrapper(tokens), n_vocab=self.size, eos_token=ends, slices=slices)
        tokens.by_length = made.greedy_tokenize
        return made


class _Tokens:
    """A vocabulary under the names that llguidance asks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.encode, self.token_bytes = vocabulary.encode, vocabulary.token_bytes
        self.eos_token_id = min(vocabulary.end_ids)
        self.special_token_ids = sorted(vocabulary.special_ids | vocabulary.end_ids)
        self.by_length: Callable[[str], Sequence[int]] = lambda text: ()
        """The longest tokens that spell a text, for what the tokenizer has no spelling of: llguidance's, once made."""
        names = {id: b"<%d>" % id for id in self.special_token_ids}
        self.tokens = [names.get(id) or vocabulary.token_bytes(id) for id in range(vocabulary.size)]

    def __call__(self, data: bytes) -> Sequence[int]:
        """How the model would write what the grammar leaves no choice about; llguidance trusts it to spell `data`."""
        text = data.decode("utf-8", "replace")
        ids = self.encode(text)
        return ids if b"".join(map(self.token_bytes, ids)) == data else self.by_length(text)


class Constraint:
    """What may follow, as tokens are accepted one by one. One for each answer."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any, starts_at: int | None = None) -> None:
        self._vocabulary, self._initial, self._starts_at = vocabulary, matcher, starts_at
        self._matcher = matcher.deep_copy()
        self._sleeps = starts_at is not None
        self._ended = False

    def fresh(self) -> Constraint:
        """The same from its beginning, for another answer."""
        return Constraint(self._vocabulary, self._initial, self._starts_at)

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._ended or (not self._sleeps and self._matcher.is_stopped())

    def mask(self) -> Tensor | None:
        """Which tokens may come next, bool [vocabulary's size] on the CPU; None when all may.

        Raises RequestError when that takes more time or memory than one step may.
        """
        if self._sleeps:
            return None
        if self._ended:
            return _only(self._vocabulary.end_ids, self._vocabulary.size)
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return bits.flatten()[: self._vocabulary.size].bool()

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen, one that the mask allows. Raises as `mask`."""
        if self._sleeps:
            self._sleeps = token_id != self._starts_at
        if self._sleeps or self._ended:
            return
        self._ended = token_id in self._vocabulary.end_ids
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"The answer cannot be kept to its schema any longer: {_reason(self._matcher)}.",
                hint="Ask for a simpler schema.",
            )


def json_rule(schema: Mapping[str, Any]) -> str:
    """A Lark expression for JSON by a schema that was checked, its white space bounded."""
    return "%json " + json.dumps({**bound(schema), "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def check_schemas(schemas: Sequence[Any], subject: str) -> None:
    """Raise RequestError, naming `subject`, for schemas too large to compile within reason."""
    nodes, text, multiple = 0, 0, 1
    for node, level in _walk(schemas):
        nodes += isinstance(node, dict | list)
        letters = len(node) if isinstance(node, str) else 8
        text += letters
        if isinstance(node, dict) and "multipleOf" in node:
            multiple = math.lcm(multiple, _numerator(node["multipleOf"], subject))
        if nodes > MOST_NODES or level > MOST_LEVELS:
            raise _refused(subject, f"more than {MOST_NODES} parts or {MOST_LEVELS} levels")
        if text > MOST_TEXT or letters > LONGEST_TEXT:
            raise _refused(subject, f"more than {MOST_TEXT} characters, or {LONGEST_TEXT} in one text")
        if multiple > LARGEST_MULTIPLE:
            raise _refused(subject, f"values of multipleOf whose common multiple is above {LARGEST_MULTIPLE}")


def compile(vocabulary: Vocabulary, lark: str, subject: str, starts_at: int | None = None) -> Constraint:
    """The constraint of a grammar whose schemas were checked.

    Args:
        subject: what an error names, e.g. "response_format".
        starts_at: everything may come until this token, with which the grammar begins.

    Raises:
        RequestError: the grammar asks for something unknown or impossible, or takes more than 5 seconds.
    """
    if not vocabulary.end_ids:
        raise RequestError(
            f"{subject} cannot be kept to, because nothing ends an answer of this model.",
            hint="Its generation_config.json should have an eos_token_id.",
        )
    made = _in_time(lambda: _matcher(vocabulary, lark))
    if made is None:
        raise _refused(subject, f"a grammar that takes more than {SECONDS:.0f} seconds to prepare")
    matcher, dead = made
    if matcher.is_error() or dead:
        reason = _reason(matcher) if matcher.is_error() else "nothing can follow it"
        raise RequestError(f"{subject} has a schema that cannot be followed: {reason}.", hint="Change the schema.")
    return Constraint(vocabulary, matcher, starts_at)


def _matcher(vocabulary: Vocabulary, lark: str) -> tuple[Any, bool]:
    """The compiled grammar, and whether it has no beginning."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
    matcher = LLMatcher(vocabulary.tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0, limits=limits)
    first = matcher.deep_copy()
    first.compute_bitmask()
    return matcher, first.is_stopped() and not first.is_accepting()


def _in_time(build: Callable[[], Any]) -> Any:
    """What `build` gives, on a thread with room for deep recursion; None if it takes too long."""
    done: list[Any] = []
    with _stack_size:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=lambda: done.append(build()), name="grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join(SECONDS)
    return done[0] if done else None


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Every value within a JSON value, keys included, with its level; no recursion, for the level is not known yet."""
    left = [(value, 0)]
    while left:
        node, level = left.pop()
        yield node, level
        if isinstance(node, dict):
            left += [(part, level + 1) for pair in node.items() for part in pair]
        elif isinstance(node, list | tuple):
            left += [(part, level + 1) for part in node]


def _numerator(multiple: Any, subject: str) -> int:
    if isinstance(multiple, dict):  # a property of that name
        return 1
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not 0 < multiple < math.inf:
        said = repr(multiple)[:40]
        raise RequestError(f"{subject} has a schema with multipleOf {said}.", hint="Give a number above 0.")
    return Fraction(str(multiple)).numerator


def _refused(subject: str, what: str) -> RequestError:
    return RequestError(f"{subject} has {what}.", hint="Give a smaller schema.")


def _reason(matcher: Any) -> str:
    """The first line of what llguidance says."""
    message = PREAMBLE.sub("", matcher.get_error().partition("\n")[0].strip().rstrip("."))
    if message.startswith("panic"):
        return "it is too large"
    return message.replace("Unimplemented keys:", "not supported:")[:300] or "it is too complex"


def _only(ids: Collection[int], size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(ids)] = True
    return mask
