"""Tools are checked, and a wrong entry is named."""

from __future__ import annotations

import pytest

from pixtral_cli.prompt.errors import InvalidTools
from pixtral_cli.prompt.tools import Tool, parse_tools


def tool(**function):
    return {"type": "function", "function": {"name": "add", **function}}


def test_a_tool_is_read_whatever_is_left_out():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given = [tool(description="Adds.", parameters=schema, strict=True), tool(name="now"), {"function": {"name": "x"}}]
    assert parse_tools(given) == (Tool("add", "Adds.", schema, strict=True), Tool("now"), Tool("x"))
    assert parse_tools(None) == parse_tools([]) == ()


@pytest.mark.parametrize(
    ("tools", "where"),
    [
        ("add", "tools"),
        ({}, "tools"),
        (["add"], "tools[0]"),
        ([tool(), {"type": "function"}], "tools[1]"),
        ([{"type": "web_search", "function": {"name": "a"}}], "tools[0]"),
        ([tool(name="a b")], "tools[0].function.name"),
        ([tool(name="a\n")], "tools[0].function.name"),
        ([tool(name="")], "tools[0].function.name"),
        ([tool(name="a" * 65)], "tools[0].function.name"),
        ([tool(name=None)], "tools[0].function.name"),
        ([tool(), tool()], "tools[1].function.name"),
        ([tool(description=1)], "tools[0].function.description"),
        ([tool(parameters=[])], "tools[0].function.parameters"),
        ([tool(strict="yes")], "tools[0].function.strict"),
    ],
)
def test_the_entry_that_is_wrong_is_named(tools, where):
    with pytest.raises(InvalidTools) as caught:
        parse_tools(tools)
    assert caught.value.where == where and str(caught.value).startswith(f"{where}: ")
