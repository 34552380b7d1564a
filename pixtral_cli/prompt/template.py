"""A conversation and a checkpoint's own Jinja template in, token ids with one mark per image out; knows no pixels.

The template is a program of a stranger: it runs in a sandbox and sees plain strings, lists and dictionaries.
Its own control strings become control ids; the same strings in a user's text stay text (see `UserTextMarks`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NoReturn

from pixtral_cli.errors import reason_of
from pixtral_cli.prompt.errors import TemplateFailed
from pixtral_cli.prompt.messages import JOIN, Conversation, ImagePart, Message, Part, TextPart, ThinkPart
from pixtral_cli.prompt.model_settings import ModelSettings
from pixtral_cli.prompt.side_file import SideFile
from pixtral_cli.prompt.thoughts import ThoughtMarks
from pixtral_cli.prompt.tokenizer import Tokenizer
from pixtral_cli.prompt.tokenizer_files import Files
from pixtral_cli.prompt.tool_calls import ARGS, CALL_ID, CALLS, CallForm
from pixtral_cli.prompt.tools import Tool, texts_in, value_of
from weights_cache.wording import FETCH_AGAIN

OWN_TEXT = 2**20
"""Characters that a template may write of its own, and calculate at once."""
OWN_TIMES = 16
"""A template may write OWN_TEXT characters, and everything in the messages so many times."""
PRIVATE_USE = range(0xF0000, 0xFFFFE)
MANY_WORDS = 50
TYPE = re.compile(r"""['"]type['"]|\.type\b""")
PART_TYPE = re.compile(r"""\btype\b['"\])]*\s*(==|!=|in\b|,\s*['"]\w+['"]\s*,)\s*[(\[]?\s*['"](text|image)""")
PART_LOOP = re.compile(r"\bfor\s+\w+\s+in\s[^%]*\bcontent\b")
THINK_TYPE = re.compile(r"""['"]thinking['"]""")
REASONING = "reasoning_content"
STRING_TEST = re.compile(r"\bis\s+(not\s+)?string\b")
BROKEN = f"{FETCH_AGAIN}, or use --raw (in Python: complete)."


def find_template(file: Files) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, or `chat_template` in one of its JSON files."""
    if path := file("chat_template.jinja"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise TemplateFailed(f"Cannot read the chat template {path}: {reason_of(error)}.", BROKEN) from error
        if template := template_in(text):
            return template
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if template := template_in(SideFile.read(file(name)).get("chat_template")):
            return template
    return None


def template_in(value: Any) -> str | None:
    """The template in a setting, alone or the default among named ones; a blank one is none."""
    if isinstance(value, list):
        value = next((e.get("template") for e in value if isinstance(e, dict) and e.get("name") == "default"), None)
    value = value.removeprefix("\ufeff") if isinstance(value, str) else ""
    return value if value.strip() else None


@dataclass
class ChatTemplate:
    """A checkpoint's template with its tokenizer."""

    source: str
    tokenizer: Tokenizer
    starts_with_bos: bool = False
    """Whether a BOS that the template leaves out is added, as transformers' processors do and its tokenizers do not."""

    def __post_init__(self) -> None:
        self._user_text = UserTextMarks(self.tokenizer.controls)
        has_type, loops = TYPE.search(self.source), PART_LOOP.search(self.source)  # a tool's description has a type too
        self._knows_parts = bool(PART_TYPE.search(self.source) or (has_type and loops))
        self._knows_strings = bool(STRING_TEST.search(self.source))
        self._knows_thoughts = bool(THINK_TYPE.search(self.source))

    @property
    def knows_tools(self) -> bool:
        """Whether the template looks at tools, calls of them or their results."""
        return "tool" in self.source

    @property
    def call_form(self) -> CallForm:
        """How the model writes its calls of tools: as the template writes those of earlier messages."""
        if CALLS not in self.tokenizer.controls:
            return "text"
        if ARGS not in self.source or ARGS not in self.tokenizer.controls:
            return "list"
        return "named with id" if CALL_ID in self.source else "named"

    def arranged(self, conversation: Conversation) -> Conversation:
        """The conversation as `encode` takes it: messages of one role in a row are one.

        The images of tools follow the results, which are text to a template.
        """
        return conversation.images_after_results().merged()

    def thought_marks(self, conversation: Conversation) -> ThoughtMarks | None:
        """How the model marks its thoughts in this conversation; None where it has none."""
        return ThoughtMarks.of(self.tokenizer, conversation, self.source)

    def encode(
        self, conversation: Conversation, tools: Sequence[Tool] = (), settings: ModelSettings | None = None
    ) -> list[int]:
        """Token ids of an `arranged` conversation, up to where the answer begins; every image is one image token.

        If the template refuses it, or passes over the question, other arrangements are tried: see `_arrangements`.
        An assistant's last message is continued.

        Raises:
            TemplateFailed: with what the template itself says.
        """
        variables = {"tools": [tool.described for tool in tools] or None} | (settings or ModelSettings()).given
        refusal: TemplateFailed | None = None
        for rearranged in _arrangements(conversation):
            try:
                return self._encode(rearranged, variables)
            except TemplateFailed as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _encode(self, conversation: Conversation, variables: dict[str, Any]) -> list[int]:
        texts = [text for message in conversation.messages for text in _texts(message)]
        texts += texts_in(variables)
        used = set().union(self.source, *texts)
        unused = (char for code in PRIVATE_USE if (char := chr(code)) not in used)
        mark, end = next(unused), next(unused)
        protect = partial(self._user_text.put, mark=mark)
        marks = self.thought_marks(conversation)
        messages = [self._entry(message, protect, marks) for message in conversation.messages]
        if conversation.is_continued:
            _put_end(messages[-1], end)
        rendered = self._render(
            OWN_TEXT + OWN_TIMES * sum(map(len, texts)),
            messages=messages,
            add_generation_prompt=not conversation.is_continued,
            **_protected(variables, protect),
        )
        if not _is_asked(conversation, rendered.replace(mark, "")):
            raise TemplateFailed("The model's chat template passes over what is asked.", BROKEN)
        if conversation.is_continued:
            rendered = _cut_at(rendered, end)
        return self._ids(rendered, mark)

    def _entry(self, message: Message, protect: Callable[[str], str], marks: ThoughtMarks | None) -> dict[str, Any]:
        """The message as the template knows it: content as a list of parts or as a string.

        A template that knows both gets a string from whoever gave one, and of whoever can have no images. Thoughts are
        parts, or `reasoning_content`; a template that knows neither gets them in the text, between their marks.
        Arguments are the value that their JSON stands for, which templates write as JSON themselves.
        """
        entry: dict[str, Any] = {"role": message.role}
        if message.thoughts and not self._knows_thoughts and REASONING in self.source and message.role == "assistant":
            entry[REASONING] = protect("".join(part.text for part in message.thoughts))
            marks = None
        takes_string = self._knows_strings and (message.is_string or message.role != "user")
        if message.thoughts and self._knows_thoughts:
            entry["content"] = [_shown(part, protect) for part in message.parts if part != TextPart("")]
        elif message.thoughts or takes_string or not self._knows_parts:
            text = _text_of(message, protect, marks)
            entry["content"] = text if takes_string or not self._knows_parts else [_text_part(text)]
        else:
            entry["content"] = [_shown(part, protect) for part in message.parts]
        if message.tool_calls:
            entry["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
                for call in message.tool_calls
                for arguments in [_protected(value_of(call.arguments), protect)]
            ]
        if message.role == "tool":
            entry |= {"tool_call_id": message.call_id} | ({"name": protect(message.name)} if message.name else {})
        return entry

    def _render(self, longest: int, **variables: Any) -> str:
        """What the template writes. Past `longest` characters it is stopped: no template needs that many."""
        compiled = self._compiled
        bos, eos = self.tokenizer.bos or "", self.tokenizer.eos or ""
        written: list[str] = []
        length = 0
        try:
            for text in compiled.generate(documents=None, bos_token=bos, eos_token=eos, **variables):
                written.append(text)
                length += len(text)
                if length > longest:
                    raise OverflowError(f"it writes more than {longest:,} characters")
        except Exception as error:  # a stranger's program can fail in any way
            raise TemplateFailed(
                f"The model's chat template refused the messages: {reason_of(error)}.",
                "Change the messages, or use --raw (in Python: complete) to write the prompt yourself.",
            ) from error
        return "".join(written)

    def _ids(self, rendered: str, mark: str) -> list[int]:
        parts = self.tokenizer.split_controls(rendered)
        bos = self.tokenizer.bos
        if self.starts_with_bos and bos is not None and self.tokenizer.adds_bos and not rendered.startswith(bos):
            parts.insert(0, self.tokenizer.control(bos))
        return self.tokenizer.encode_with_controls(
            [part.replace(mark, "") if isinstance(part, str) else part for part in parts]
        )

    @cached_property
    def _compiled(self) -> Any:
        try:
            return _sandbox().from_string(self.source)
        except Exception as error:  # Jinja's own, and Python's about what Jinja compiles to
            raise TemplateFailed(f"The model's chat template is broken: {reason_of(error)}.", BROKEN) from error


class UserTextMarks:
    """Marks in a user's text that keep control strings in it apart from a template's own.

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

    def put(self, text: str, mark: str) -> str:
        """`text` with `mark` where it belongs; a template may trim the blanks at the end before it goes on."""
        end = len(text.rstrip())
        tail = max(0, end - self._longest)
        broken = (text[at] + mark * (text[at:end] in self._beginnings) for at in range(tail, end))
        return self._first_letters.sub(rf"\g<0>{mark}", text[:tail] + "".join(broken) + text[end:])


def _texts(message: Message) -> Iterator[str]:
    """What a client wrote in it."""
    yield from (part.text for part in message.parts if not isinstance(part, ImagePart))
    yield message.name
    for call in message.tool_calls:
        yield call.name
        yield from texts_in(value_of(call.arguments))


def _protected(value: Any, protect: Callable[[str], str]) -> Any:
    """The same JSON value with every string in it protected."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, dict):
        return {_protected(key, protect): _protected(entry, protect) for key, entry in value.items()}
    return [_protected(entry, protect) for entry in value] if isinstance(value, list) else value


def _arrangements(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation, and then what strict templates ask for, each once.

    System texts move to the front and an empty user turn precedes an answer that has none; then user and assistant take
    turns, by an empty one after a call that was denied or where the user speaks after a result. A template may want
    every turn to say something: a space does. One without a system role gets its text in the last user turn.
    """
    yield conversation
    tried = [conversation]
    tidied = conversation.system_first()
    for start in (tidied, tidied.system_in_user()):
        for arranged in (start, start.alternating(""), start.alternating(" ")):
            if arranged not in tried:
                tried.append(arranged)
                yield arranged


def _is_asked(conversation: Conversation, rendered: str) -> bool:
    """Whether a word of what is asked is in the prompt: by the last user turn, or by the system where it is blank."""
    user = next((message for message in reversed(conversation.messages) if message.role == "user"), None)
    words = _bare_words(user.text) if user else []
    if not words and not (user and user.images):
        words = [word for m in conversation.messages if m.role == "system" for word in _bare_words(m.text)]
    written = "".join(_bare_words(rendered))
    return not words or any(word in written for word in words)


def _bare_words(text: str) -> list[str]:
    """Letters and digits alone, in one case: a template may change the case, or write the text as JSON."""
    words = ("".join(filter(str.isalnum, word)) for word in text.casefold().split(None, MANY_WORDS))
    return [word for word in words if word]


def _shown(part: Part, protect: Callable[[str], str]) -> dict[str, Any]:
    """A part as templates read it."""
    if isinstance(part, TextPart):
        return _text_part(protect(part.text))
    if isinstance(part, ThinkPart):
        return {"type": "thinking", "thinking": protect(part.text), "closed": part.closed}
    return {"type": "image"}


def _text_of(message: Message, protect: Callable[[str], str], marks: ThoughtMarks | None) -> str:
    """The texts of a message, and its thoughts between their marks, if there are any."""
    written = []
    for kind, group in groupby(message.parts, key=type):
        if kind is TextPart:
            written.append(protect(JOIN.join(part.text for part in group if isinstance(part, TextPart))))
        elif marks is not None:
            written += [marks.around(protect(p.text), p.closed) for p in group if isinstance(p, ThinkPart)]
    return "".join(written)


def _text_part(text: str) -> dict[str, str]:
    """Published templates read a text part's "text" or its "content"."""
    return {"type": "text", "text": text, "content": text}


def _put_end(entry: dict[str, Any], end: str) -> None:
    """Mark where the text of a message ends, with a space after it, which a template that trims takes away."""
    if isinstance(entry["content"], str):
        entry["content"] += f"{end} "
    else:
        *parts, last = entry["content"] or [_text_part("")]
        if last["type"] == "thinking" and last["closed"]:
            parts, last = [*parts, last], _text_part("")
        kind = last["type"]
        changed = _text_part(f"{last[kind]}{end} ") if kind == "text" else last | {kind: f"{last[kind]}{end} "}
        entry["content"] = [*parts, changed]


def _cut_at(rendered: str, end: str) -> str:
    """What stands before the mark, trimmed if the template trims: transformers' `continue_final_message`."""
    before, found, after = rendered.rpartition(end)
    if not found:
        raise TemplateFailed("The model's chat template passes over the text that is to be continued.", BROKEN)
    before = before.replace(end, "")
    return before if after.startswith(" ") else before.rstrip()


def _sandbox() -> Any:
    """The Jinja environment that transformers gives chat templates, without more, and with limits."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _refuse_giant(operator, left, right)
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}``, which some templates put around answers, shows its body."""

        tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)  # noqa: DTZ005  local time, as in transformers

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _refuse_giant(operator: str, left: Any, right: Any) -> None:
    """Raise OverflowError for a product or power of more than OWN_TEXT letters, items or bits.

    A few characters of arithmetic could fill the memory.
    """
    sizes = [value.bit_length() if isinstance(value, int) else 1 for value in (left, right)]
    if operator == "**":
        size = sizes[0] * right if isinstance(right, int) else 0
    else:
        times = next((value for value in (left, right) if isinstance(value, int)), 0)
        size = sum(sizes) + max((len(v) * times for v in (left, right) if hasattr(v, "__len__")), default=0)
    if size > OWN_TEXT:
        raise OverflowError(f"it calculates something of more than {OWN_TEXT:,} characters")
