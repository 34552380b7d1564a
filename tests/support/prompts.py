"""Token ids of OpenAI-style messages in one chat format, without a checkpoint around it."""

from __future__ import annotations

from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.tools import parse_tools


def chat_ids(chat_format, messages, tools=None):
    """As `Processor.chat` has them made: one image token for each image."""
    return chat_format.encode(chat_format.arranged(parse(messages)), parse_tools(tools))
