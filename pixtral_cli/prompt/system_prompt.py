"""The SYSTEM_PROMPT.txt of a repository in, the message of the system that it means out.

Source: the model cards of Mistral's repositories, which fill in the model's name and two days, and make parts of a
thought that the text shows.
"""

from __future__ import annotations

import re
from datetime import date, timedelta
from typing import Any

FILE = "SYSTEM_PROMPT.txt"
THOUGHT = re.compile(r"\[THINK\](.*?)\[/THINK\]", re.DOTALL)


def message(text: str, name: str, today: date, *, shows_thoughts: bool) -> dict[str, Any]:
    """An OpenAI-style message: `text` with {name}, {today} and {yesterday} filled in, days as 2026-11-28.

    Args:
        shows_thoughts: whether [THINK] and [/THINK] are the model's control tokens and not plain text.
    """
    filled = {"{name}": name, "{today}": str(today), "{yesterday}": str(today - timedelta(days=1))}
    text = re.sub("|".join(map(re.escape, filled)), lambda match: filled[match[0]], text)
    if not (shows_thoughts and THOUGHT.search(text)):
        return {"role": "system", "content": text}
    pieces = THOUGHT.split(text)  # every second one is a thought
    parts = [
        {"type": "thinking", "thinking": piece} if place % 2 else {"type": "text", "text": piece}
        for place, piece in enumerate(pieces)
    ]
    return {"role": "system", "content": [part for part in parts if part.get("text") != ""]}
