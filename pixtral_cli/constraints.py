"""`response_format` and `tool_choice` in, the engine's constraint on an answer out. Joins prompt and engine.

A forced call is written as the model writes its own: in which form, the prompt says. A model that thinks may do so
before whatever its answer is bound to, unless it is asked not to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pixtral_cli.engine import grammar
from pixtral_cli.engine.grammar import Constraint, Vocabulary
from pixtral_cli.errors import RequestError
from pixtral_cli.prompt.tool_calls import ARGS, CALL_ID, CALLS, call_marks
from pixtral_cli.prompt.tools import Tool

if TYPE_CHECKING:
    from pixtral_cli.generation_options import GenerationOptions
    from pixtral_cli.prompt.processor import Prompt
    from pixtral_cli.prompt.tokenizer import Tokenizer

MOST_CALLS = 16


def vocabulary(tokenizer: Tokenizer, end_ids: Collection[int]) -> Vocabulary:
    """A model's tokens as grammars need them; nothing is computed until the first one asks."""
    return Vocabulary(
        tokenizer.id_limit,
        tokenizer.token_bytes,
        lambda text: tokenizer.encode(text, at_start=False),
        end_ids,
        tokenizer.special_ids | set(call_marks(tokenizer).values()),
    )


def banned(prompt: Prompt, options: GenerationOptions, tokenizer: Tokenizer) -> dict[int, float]:
    """The bias that keeps a model from calling the tools that it knows of: minus infinity for what begins a call."""
    marks = call_marks(tokenizer)
    return {marks[CALLS]: float("-inf")} if options.tool_choice == "none" and CALLS in marks else {}


def constraint(
    prompt: Prompt, options: GenerationOptions, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> Constraint | None:
    """What the answer is bound to; None when it is free. This may take seconds.

    Raises:
        RequestError: a schema cannot be followed or is too large, or `tool_choice` and the tools do not match.
    """
    schema, tools = options.schema, _callable(prompt.tools, options)
    several = options.parallel_tool_calls and options.chosen_tool is None
    calls = CallRules(prompt, tools, several, call_marks(tokenizer)) if tools else None
    thought, rules = _thought(prompt, options, tokenizer)
    if calls and options.must_call:
        return calls.compile(vocabulary, f"start: {thought}calls{rules}")
    if prompt.call_form == "text":
        calls = None  # such a model calls only when it must
    if schema is None:
        return None if calls is None else calls.when_begun(vocabulary)
    grammar.check_schemas([schema], "response_format")
    answer = f"answer: {grammar.json_rule(schema)}"
    if calls:
        either = f"start: {thought}(answer | calls){rules}\n{answer}"
        return calls.compile(vocabulary, either, "response_format or tools")
    return grammar.compile(vocabulary, f"start: {thought}answer{rules}\n{answer}", "response_format")


def _thought(prompt: Prompt, options: GenerationOptions, tokenizer: Tokenizer) -> tuple[str, str]:
    """What stands for a thought at the beginning of a rule, and its own rules: nothing where there is to be none."""
    marks, is_open = prompt.thought_marks, prompt.thought_is_open
    may_begin = prompt.answer_starts_text and options.reasoning_effort != "none"
    if marks is None or not (is_open or may_begin):
        return "", ""
    if marks.are_controls:
        begin, end = (f"<[{tokenizer.control(mark)}]>" for mark in (marks.begin, marks.end))
        inside = f"THOUGHT? {end}\nTHOUGHT: /(.|\\n)+/"
    else:
        end = marks.end.replace("/", r"\/")
        begin, inside = f'"{marks.begin}"', f"inside BLANKS\ninside[lazy]: /(.|\\n)*{end}/\nBLANKS: /[ \\n]*/"
    return "thought " if is_open else "thought? ", f"\nthought: {'' if is_open else begin} {inside}"


def _callable(tools: tuple[Tool, ...], options: GenerationOptions) -> tuple[Tool, ...]:
    """Those that `tool_choice` leaves."""
    if options.tool_choice == "none":
        return ()
    if options.must_call and not tools:
        raise RequestError("tool_choice asks for a call, and there are no tools.", hint="Give tools as well.")
    name = options.chosen_tool
    chosen = tuple(tool for tool in tools if name in (None, tool.name))
    if tools and not chosen:
        raise RequestError(f"tool_choice names {name}, which is none of the tools.", hint="Name one of them.")
    return chosen


class CallRules:
    """The grammar of calls of these tools, in the form that the prompt says."""

    def __init__(self, prompt: Prompt, tools: tuple[Tool, ...], several: bool, marks: Mapping[str, int]) -> None:
        self.form, self.tools, self.marks = prompt.call_form, tools, marks
        self.more = MOST_CALLS - 1 if several else 0

    def compile(self, vocabulary: Vocabulary, start: str, subject: str = "tools", at: int | None = None) -> Constraint:
        """Of a Lark grammar whose `start` uses the rule `calls`. Raises RequestError."""
        grammar.check_schemas([tool.parameters for tool in self.tools], "tools")
        rules = [start, *self._calls()]
        for index, tool in enumerate(self.tools):
            rules.append(f"arguments_{index}: {grammar.json_rule({**tool.parameters, 'type': 'object'})}")
        return grammar.compile(vocabulary, "\n".join(rules), subject, at)

    def when_begun(self, vocabulary: Vocabulary) -> Constraint | None:
        """Text is free, and a call that the model begins by itself keeps to the tools.

        Where their schemas say more than grammars know, calls are free as well, unless a tool is strict.
        """
        try:
            return self.compile(vocabulary, "start: calls", at=self.marks[CALLS])
        except RequestError:
            if any(tool.strict for tool in self.tools):
                raise
            return None

    def _calls(self) -> list[str]:
        if self.form in ("list", "text"):
            more = f' (", " call){{0,{self.more}}}' if self.more else ""
            begin = self._mark(CALLS) if self.form == "list" else ""
            return [
                f'calls: {begin} "[" call{more} "]"',
                r'call: "{\"name\": " named ID? "}"',
                self._one_of('"\\"{name}\\", \\"arguments\\": "'),
                r'ID: /, "id": "[a-zA-Z0-9]{9}"/',
            ]
        id = f" {self._mark(CALL_ID)} ID" if self.form == "named with id" else ""
        return [
            f"calls: call{{1,{1 + self.more}}}",
            f"call: {self._mark(CALLS)} named",
            self._one_of(f'"{{name}}"{id} {self._mark(ARGS)}'),
            *(["ID: /[a-zA-Z0-9]{9}/"] if id else []),
        ]

    def _one_of(self, head: str) -> str:
        """Each tool's name, as `head` has it, with its arguments."""
        ways = (f"{head.replace('{name}', tool.name)} arguments_{index}" for index, tool in enumerate(self.tools))
        return f"named: {' | '.join(ways)}"

    def _mark(self, name: str) -> str:
        return f"<[{self.marks[name]}]>"
