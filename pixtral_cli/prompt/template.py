"""A conversation and a checkpoint's own Jinja template in, token ids with one mark per picture out.

The template is data from a stranger: it runs in a sandbox and sees plain strings, lists and dictionaries.
Its own control strings become control ids; the same strings in a user's text stay text (see `Shield`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

from pixtral_cli.prompt.errors import TemplateFailed
from pixtral_cli.prompt.messages import Conversation, Message, Picture, Text
from pixtral_cli.prompt.settings import Settings, reason_of
from pixtral_cli.prompt.tokenizer import Files, Tokenizer
from pixtral_cli.prompt.tool_calls import ARGS, CALL_ID, CALLS, CallForm
from pixtral_cli.prompt.tools import Tool, ToolCall, texts_in, value_of

Protect = Callable[[str], str]
PRIVATE_USE = range(0xF0000, 0xFFFFE)
OWN_TEXT, OWN_TIMES = 2**20, 16
"""A template may write so many characters of its own, and everything in the messages so many times."""
TYPE = re.compile(r"""['"]type['"]|\.type\b""")
CHUNK_TYPE = re.compile(r"""\btype\b['"\])]*\s*(==|!=|in\b|,\s*['"]\w+['"]\s*,)\s*[(\[]?\s*['"](text|image)""")
CHUNK_LOOP = re.compile(r"\bfor\s+\w+\s+in\s[^%]*\bcontent\b")
BROKEN = "Fetch the model again with --force-download, or use --raw (in Python: complete)."


def find_template(file: Files) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, or `chat_template` in one of its JSON files."""
    if path := file("chat_template.jinja"):
        return _read(path)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = Settings.read(file(name)).values.get("chat_template")
        if isinstance(template, list):  # named templates
            default = (e for e in template if isinstance(e, dict) and e.get("name") == "default")
            template = next(default, {}).get("template")
        if isinstance(template, str):
            return template
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise TemplateFailed(f"Cannot read the chat template {path}: {reason_of(error)}.", BROKEN) from error


class Shield:
    """Keeps control strings in a user's text apart from a template's own.

    A character that occurs nowhere else is put after the first letter of every control string in the text, and of
    every beginning of one at its end, which the next text could complete. The template can still trim, split and
    compare the text. Once the template's own control strings have been found, the character is taken out again.
    """

    def __init__(self, controls: Iterable[str]):
        controls = [control for control in controls if len(control) > 1]
        rests = {letter: [c[1:] for c in controls if c[0] == letter] for letter in {c[0] for c in controls}}
        patterns = [rf"{re.escape(letter)}(?={'|'.join(map(re.escape, rest))})" for letter, rest in rests.items()]
        self._first_letters = re.compile("|".join(patterns) or "(?!)")
        self._beginnings = {control[:length] for control in controls for length in range(1, len(control))}
        self._longest = max(map(len, controls), default=1) - 1

    def mark_for(self, texts: Iterable[str]) -> str:
        """A private-use character that none of `texts` holds."""
        used = set().union(*texts)
        return next(chr(code) for code in PRIVATE_USE if chr(code) not in used)

    def raise_over(self, text: str, mark: str) -> str:
        return self._first_letters.sub(rf"\g<0>{mark}", self._broken_end(text, mark))

    def _broken_end(self, text: str, mark: str) -> str:
        """The mark after each letter that begins a control string which the end of `text`, trimmed, breaks off."""
        end = len(text.rstrip())
        tail = max(0, end - self._longest)
        marked = (text[at] + mark * (text[at:end] in self._beginnings) for at in range(tail, end))
        return text[:tail] + "".join(marked) + text[end:]


@dataclass
class ChatTemplate:
    """A checkpoint's template with its tokenizer."""

    source: str
    tokenizer: Tokenizer
    starts_with_bos: bool = False
    """Whether a BOS that the template leaves out is added, as transformers' processors do and its tokenizers do not."""

    @property
    def knows_tools(self) -> bool:
        """Whether the template looks at tools, calls of them or their results."""
        return "tool" in self.source

    @property
    def call_form(self) -> CallForm:
        """How the model writes its calls of tools: as the template writes those of earlier turns."""
        if CALLS not in self.tokenizer.controls:
            return "text"
        if ARGS not in self.source or ARGS not in self.tokenizer.controls:
            return "list"
        return "named with id" if CALL_ID in self.source else "named"

    def encode(self, conversation: Conversation, tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids up to where the answer begins; every picture is one image token.

        Consecutive messages of one role are put together first. If the template refuses the rest, a system message
        in the middle moves to the front and an empty user turn precedes an answer that has none.

        Raises:
            TemplateFailed: with what the template itself says.
        """
        described = [tool.described for tool in tools] or None
        conversation = conversation.merged()
        try:
            return self._encode(conversation, described)
        except TemplateFailed:
            if (tidied := conversation.system_first()) == conversation:
                raise
            return self._encode(tidied, described)

    def _encode(self, conversation: Conversation, tools: list[dict[str, Any]] | None) -> list[int]:
        texts = [text for message in conversation.messages for text in _texts(message)] + [*texts_in(tools)]
        mark = self._shield.mark_for([self.source, *texts])
        protect = partial(self._shield.raise_over, mark=mark)
        longest = OWN_TEXT + OWN_TIMES * sum(map(len, texts))
        messages = [self._entry(message, protect) for message in conversation.messages]
        rendered = self._render(messages, _protected(tools, protect), longest)
        ids = self._forgotten_bos(rendered)
        for part in self.tokenizer.split_controls(rendered):
            if isinstance(part, int):
                ids.append(part)
            elif text := part.replace(mark, ""):
                ids += self.tokenizer.encode(text, at_start=not ids)
        return ids

    def _forgotten_bos(self, rendered: str) -> list[int]:
        bos = self.tokenizer.bos
        needed = self.starts_with_bos and bos is not None and self.tokenizer.adds_bos and not rendered.startswith(bos)
        return [self.tokenizer.control(bos)] if needed else []

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, longest: int) -> str:
        pieces = self._compiled.generate(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=True,
            bos_token=self.tokenizer.bos or "",
            eos_token=self.tokenizer.eos or "",
        )
        try:
            return _joined(pieces, longest)
        except Exception as error:  # a stranger's program can fail in any way
            raise TemplateFailed(
                f"The model's chat template refused the messages: {reason_of(error)}.",
                "Change the messages, or use --raw (in Python: complete) to write the prompt yourself.",
            ) from error

    def _entry(self, message: Message, protect: Protect) -> dict[str, Any]:
        """The message as the template knows it: content as a list of chunks or as a string."""
        if self._knows_chunks and not (self._knows_strings and _is_plain(message)):
            content: Any = [_chunk(chunk, protect) for chunk in message.chunks]
        else:
            content = protect(message.text)
        entry = {"role": message.role, "content": content}
        if message.tool_calls:
            entry["tool_calls"] = [_call(call, protect) for call in message.tool_calls]
        if message.role == "tool":
            entry |= {"tool_call_id": message.answers} | ({"name": protect(message.name)} if message.name else {})
        return entry

    @cached_property
    def _shield(self) -> Shield:
        return Shield(self.tokenizer.controls)

    @cached_property
    def _knows_chunks(self) -> bool:
        """Whether content may be a list; a template that only describes tools has the word type as well."""
        return CHUNK_TYPE.search(self.source) is not None or (
            TYPE.search(self.source) is not None and CHUNK_LOOP.search(self.source) is not None
        )

    @cached_property
    def _knows_strings(self) -> bool:
        return re.search(r"\bis\s+(not\s+)?string\b", self.source) is not None

    @cached_property
    def _compiled(self) -> Any:
        try:
            return _environment().from_string(self.source)
        except Exception as error:  # Jinja's own, and Python's about what Jinja compiles to
            raise TemplateFailed(f"The model's chat template is broken: {reason_of(error)}.", BROKEN) from error


def _joined(pieces: Iterable[str], longest: int) -> str:
    """The pieces in one. Raises OverflowError past `longest` characters: no template needs that many."""
    text: list[str] = []
    length = 0
    for piece in pieces:
        text.append(piece)
        length += len(piece)
        if length > longest:
            raise OverflowError(f"it writes more than {longest:,} characters")
    return "".join(text)


def _is_plain(message: Message) -> bool:
    """Whether the content is given as a string: always for who can have no pictures."""
    return message.is_string or message.role != "user"


def _chunk(chunk: Text | Picture, protect: Protect) -> dict[str, str]:
    """Published templates read a text chunk's "text" or its "content"."""
    if isinstance(chunk, Picture):
        return {"type": "image"}
    text = protect(chunk.text)
    return {"type": "text", "text": text, "content": text}


def _call(call: ToolCall, protect: Protect) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, of the value that they stand for."""
    function = {"name": call.name, "arguments": _protected(value_of(call.arguments), protect)}
    return {"id": call.id, "type": "function", "function": function}


def _texts(message: Message) -> Iterable[str]:
    """What a client wrote in it."""
    yield from (chunk.text for chunk in message.chunks if isinstance(chunk, Text))
    yield message.name
    for call in message.tool_calls:
        yield call.name
        yield from texts_in(value_of(call.arguments))


def _protected(value: Any, protect: Protect) -> Any:
    """The same with every string in it protected."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, dict):
        return {_protected(key, protect): _protected(entry, protect) for key, entry in value.items()}
    return [_protected(entry, protect) for entry in value] if isinstance(value, list) else value


def _environment() -> Any:
    """Jinja as chat templates are written for: what transformers gives them, without more."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """In which a few characters of arithmetic cannot fill the memory."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _refuse_giant(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _refuse_giant(operator: str, left: Any, right: Any) -> None:
    """Raise OverflowError for a product or power of more than OWN_TEXT letters, items or bits."""
    sizes = [value.bit_length() if isinstance(value, int) else 1 for value in (left, right)]
    if operator == "**":
        size = sizes[0] * right if isinstance(right, int) else 0
    else:
        times = next((value for value in (left, right) if isinstance(value, int)), 0)
        size = sum(sizes) + max((len(v) * times for v in (left, right) if hasattr(v, "__len__")), default=0)
    if size > OWN_TEXT:
        raise OverflowError(f"it calculates something of more than {OWN_TEXT:,} characters")


def _generation_tag() -> type:
    """``{% generation %}…{% endgeneration %}``, which some templates put around answers, shows its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


_strftime_now: Callable[[str], str] = lambda form: datetime.now().strftime(form)  # noqa: E731
