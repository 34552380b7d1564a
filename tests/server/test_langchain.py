"""LangChain's published suite for chat models, through its two clients, against the server of the built-in model.

What a toy cannot do is expected to fail as toys fail: a request that is refused still fails its test.
"""

from pathlib import Path

import httpx
import openai
import pytest
from langchain_core.exceptions import OutputParserException
from langchain_mistralai import ChatMistralAI
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import ValidationError

SHAPES = (Path(__file__).parents[2] / "examples" / "shapes.png").read_bytes()
BOUND = ("test_structured_output", "test_tool_choice", "test_tool_calling")
"""Whose answers hold texts, in which the toy finds no end by itself."""
TOYISH = (AssertionError, OutputParserException, ValidationError, openai.LengthFinishReasonError)
BY_ITSELF = "the built-in model calls no tool of its own accord"
CANNOT = {
    "test_tool_calling": "the built-in model does not copy a number into a call",
    "test_tool_calling_async": "the built-in model does not copy a number into a call",
    "test_bind_runnables_as_tools": "the built-in model does not choose a text for a call",
    "test_unicode_tool_call_integration": "the built-in model does not copy Chinese into a call",
    "test_agent_loop": BY_ITSELF,
    "test_json_mode": "the built-in model does not know which keys it is asked for in words",
}


class Suite(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def served(self, server, request, monkeypatch):
        name = request.node.originalname
        self.url = f"{server.url}/v1"
        quote = server.service.model.processor.tokenizer.encode('"', at_start=False)[0]
        self.bias = {str(quote): 30} if name.startswith(BOUND) else {}
        monkeypatch.setattr(httpx, "get", lambda url, **_: httpx.Response(200, content=SHAPES))  # the suite's picture
        if name in CANNOT:
            request.applymarker(pytest.mark.xfail(reason=CANNOT[name], raises=TOYISH))

    @property
    def chat_model_params(self):
        return {"model": "tiny", "api_key": "none is asked for", "temperature": 0, "max_tokens": 150}

    @property
    def supports_image_inputs(self):
        return True

    @property
    def supports_json_mode(self):
        return True

    @property
    def model_override_value(self):
        return "tiny"


class TestThroughOpenAI(Suite):
    chat_model_class = ChatOpenAI

    @property
    def chat_model_params(self):
        more = {"base_url": self.url, "stream_usage": True, "logit_bias": self.bias}
        return super().chat_model_params | more | {"model_kwargs": {"parallel_tool_calls": False}}

    @property
    def supports_image_tool_message(self):
        return True


class TestThroughMistral(Suite):
    """Pictures in results of tools are not tried: the client sends LangChain's own form of them, which is no API's."""

    chat_model_class = ChatMistralAI

    @property
    def chat_model_params(self):
        more = {"parallel_tool_calls": False, "logit_bias": self.bias}
        return super().chat_model_params | {"endpoint": self.url, "model_kwargs": more}
