"""The Jinja that chat templates are written for: transformers' helpers, in a sandbox with limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

OWN_TEXT = 2**20
"""Characters that a template may write of its own, and calculate at once."""


def environment() -> Any:
    """What transformers gives chat templates, without more."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """In which a few characters of arithmetic cannot fill the memory."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _refuse_giant(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()])
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
