"""A conversation and a checkpoint's own Jinja template in, token ids with one mark per picture out.

The template is data from a stranger: it runs in a sandbox and sees plain strings, lists and dictionaries.
Its own control strings become control ids; the same strings in a user's text stay text (see `Shield`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pixtral_cli.prompt.errors import TemplateFailed
from pixtral_cli.prompt.messages import Conversation, ImagePart, Message, TextPart
from pixtral_cli.prompt.sandbox import OWN_TEXT, environment
from pixtral_cli.prompt.settings import Settings, reason_of
from pixtral_cli.prompt.tokenizer import Tokenizer
from pixtral_cli.prompt.tokenizer_files import Files
from pixtral_cli.prompt.tool_calls import ARGS, CALL_ID, CALLS, CallForm
from pixtral_cli.prompt.tools import Tool, ToolCall, texts_in, value_of
from weights_cache.errors import GetAgain

Protect = Callable[[str], str]
PRIVATE_USE = range(0xF0000, 0xFFFFE)
OWN_TIMES = 16
"""A template may write OWN_TEXT characters, and everything in the messages so many times."""
MANY_WORDS = 50
TYPE = re.compile(r"""['"]type['"]|\.type\b""")
CHUNK_TYPE = re.compile(r"""\btype\b['"\])]*\s*(==|!=|in\b|,\s*['"]\w+['"]\s*,)\s*[(\[]?\s*['"](text|image)""")
CHUNK_LOOP = re.compile(r"\bfor\s+\w+\s+in\s[^%]*\bcontent\b")
BROKEN = GetAgain(", or use --raw (in Python: complete)")


def find_template(file: Files) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, or `chat_template` in one of its JSON files."""
    if (path := file("chat_template.jinja")) and (template := written_template(_read(path))):
        return template
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if template := written_template(Settings.read(file(name)).values.get("chat_template")):
            return template
    return None


def written_template(value: Any) -> str | None:
    """The template in a setting, alone or the default among named ones; a blank one is none."""
    if isinstance(value, list):
        value = next((e.get("template") for e in value if isinstance(e, dict) and e.get("name") == "default"), None)
    value = value.removeprefix("\ufeff") if isinstance(value, str) else ""
    return value if value.strip() else None


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

    def marks_for(self, texts: Iterable[str]) -> tuple[str, str]:
        """Two private-use characters that none of `texts` holds."""
        used = set().union(*texts)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        return next(free), next(free)

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

        Consecutive messages of one role are put together first. If the template refuses the rest, or passes over the
        question, other arrangements are tried: see `_arrangements`. An assistant's last message is continued.

        Raises:
            TemplateFailed: with what the template itself says.
        """
        described = [tool.described for tool in tools] or None
        refusal: TemplateFailed | None = None
        for arranged in _arrangements(self.arranged(conversation)):
            try:
                return self._encode(arranged, described)
            except TemplateFailed as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def arranged(self, conversation: Conversation) -> Conversation:
        """The turns as the template gets them at first. Pictures of tools follow the results, which are text to it."""
        return conversation.images_after_results().merged()

    def _encode(self, conversation: Conversation, tools: list[dict[str, Any]] | None) -> list[int]:
        texts = [text for message in conversation.messages for text in _texts(message)] + [*texts_in(tools)]
        mark, end = self._shield.marks_for([self.source, *texts])
        protect = partial(self._shield.raise_over, mark=mark)
        longest = OWN_TEXT + OWN_TIMES * sum(map(len, texts))
        messages = [self._entry(message, protect) for message in conversation.messages]
        if conversation.is_continued:
            _put_end(messages[-1], end)
        rendered = self._render(messages, _protected(tools, protect), longest, answers=not conversation.is_continued)
        if not _is_asked(conversation, rendered.replace(mark, "")):
            raise TemplateFailed("The model's chat template passes over what is asked.", BROKEN)
        if conversation.is_continued:
            rendered = _cut_at(rendered, end)
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

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, longest: int, answers: bool
    ) -> str:
        pieces = self._compiled.generate(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=answers,
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
        """The message as the template knows it: content as a list of parts or as a string."""
        if self._knows_chunks and not (self._knows_strings and _is_plain(message)):
            content: Any = [_part(part, protect) for part in message.parts]
        else:
            content = protect(message.text)
        entry = {"role": message.role, "content": content}
        if message.tool_calls:
            entry["tool_calls"] = [_call(call, protect) for call in message.tool_calls]
        if message.role == "tool":
            entry |= {"tool_call_id": message.call_id} | ({"name": protect(message.name)} if message.name else {})
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
            return environment().from_string(self.source)
        except Exception as error:  # Jinja's own, and Python's about what Jinja compiles to
            raise TemplateFailed(f"The model's chat template is broken: {reason_of(error)}.", BROKEN) from error


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
    if not words and not (user and user.has_images):
        words = [word for m in conversation.messages if m.role == "system" for word in _bare_words(m.text)]
    written = _bare(rendered)
    return not words or any(word in written for word in words)


def _bare_words(text: str) -> list[str]:
    return [bare for word in text.split(None, MANY_WORDS) if (bare := _bare(word))]


def _bare(text: str) -> str:
    """Letters and digits alone, in one case: a template may change the case, or write the text as JSON."""
    return "".join(filter(str.isalnum, text.casefold()))


def _put_end(entry: dict[str, Any], end: str) -> None:
    """Mark where the text of a message ends, with a space after it, which a template that trims takes away."""
    if isinstance(entry["content"], str):
        entry["content"] += f"{end} "
        return
    parts = entry["content"] or [{"type": "text", "text": "", "content": ""}]
    text = f"{parts[-1]['text']}{end} "
    entry["content"] = [*parts[:-1], {"type": "text", "text": text, "content": text}]


def _cut_at(rendered: str, end: str) -> str:
    """What stands before the mark, trimmed if the template trims: transformers' `continue_final_message`."""
    before, found, after = rendered.rpartition(end)
    if not found:
        raise TemplateFailed("The model's chat template passes over the text that is to be continued.", BROKEN)
    before = before.replace(end, "")
    return before if after.startswith(" ") else before.rstrip()


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


def _part(part: TextPart | ImagePart, protect: Protect) -> dict[str, str]:
    """Published templates read a text part's "text" or its "content"."""
    if isinstance(part, ImagePart):
        return {"type": "image"}
    text = protect(part.text)
    return {"type": "text", "text": text, "content": text}


def _call(call: ToolCall, protect: Protect) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, of the value that they stand for."""
    function = {"name": call.name, "arguments": _protected(value_of(call.arguments), protect)}
    return {"id": call.id, "type": "function", "function": function}


def _texts(message: Message) -> Iterable[str]:
    """What a client wrote in it."""
    yield from (part.text for part in message.parts if isinstance(part, TextPart))
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
