"""OpenAI's JSON becomes what is asked of the engine; what is not supported is refused by its name."""

import dataclasses

import pytest

from pixtral_cli.server import wire
from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.request_body import validated
from pixtral_cli.server.request_schemas import ChatRequest, CompletionRequest, PredictRequest, TokenizeRequest

HELLO = [{"role": "user", "content": "Hello"}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(**fields):
    return wire.chat(validated(ChatRequest, {"model": "m", "messages": HELLO, **fields}))


def completion(**fields):
    return wire.completion(validated(CompletionRequest, {"model": "m", "prompt": "Hello", **fields}))


def predict(**fields):
    return wire.predict(validated(PredictRequest, {"messages": HELLO, **fields}))


def tokenize(body):
    given = validated(TokenizeRequest, body)
    wire.check_tokenize(given)
    return given


def refused(make, *args, **fields):
    with pytest.raises(ApiError) as caught:
        make(*args, **fields)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def test_every_sampling_field_reaches_the_engine_under_its_own_name():
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "frequency_penalty": -1.5,
        "presence_penalty": 1,
        "repetition_penalty": 1.2,
        "seed": 3,
        "stop": ["a", "b"],
        "logit_bias": {"17": -100},
        "ignore_eos": True,
    }
    assert chat(**given).options == given
    assert completion(**given).options == {**given, "max_new_tokens": 16}


def test_what_is_not_given_is_left_to_the_server():
    assert chat().options == {}
    nothing = ("temperature", "seed", "stop", "n", "tools", "response_format", "max_tokens", "stream_options", "user")
    assert chat(**dict.fromkeys(nothing)) == chat()


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "somebody"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"prompt_cache_key": "a", "prompt_cache_retention": "24h", "safety_identifier": "b", "cache_prompt": True},
        {"modalities": ["text"], "verbosity": "low", "safe_prompt": False},
        {"prediction": {"type": "content", "content": "Hello"}},
        {"top_logprobs": 0},
        {"best_of": 1},
        {"stream_options": {"include_obfuscation": True}},
    ],
)
def test_what_changes_no_answer_is_accepted_and_changes_nothing(fields):
    assert chat(stream=True, **fields) == chat(stream=True)
    shared = {name: value for name, value in fields.items() if name in CompletionRequest.model_fields}
    assert completion(stream=True, **shared) == completion(stream=True)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"audio": {}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"functions": [{"name": "add", "colour": 1}]}, "functions[0].colour"),
        ({"messages": [{"role": "user", "content": "a", "colour": "red"}]}, "messages[0].colour"),
        ({"messages": [{"role": "user", "content": [{**PICTURE, "size": 3}]}]}, "messages[0].content[0].size"),
        ({"tools": [{**TOOL, "server": "x"}]}, "tools[0].server"),
        ({"stream": True, "stream_options": {"obfuscate": True}}, "stream_options.obfuscate"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ],
)
def test_a_field_that_is_not_supported_is_refused_by_its_name(fields, name):
    error = refused(chat, **fields)
    assert error.param == name
    assert name in error.message


def test_null_asks_for_nothing_also_by_a_name_that_is_not_supported():
    nothing = dict.fromkeys(("functions", "function_call", "audio", "modalities", "prediction", "web_search_options"))
    assert chat(**nothing) == chat()
    assert completion(echo=None, suffix=None, best_of=None) == completion()
    part = {**PICTURE, "cache_control": None}
    assert chat(messages=[{"role": "user", "content": [part], "name": None}])
    assert refused(chat, messages=None).param == "messages"


@pytest.mark.parametrize("field", ["echo", "suffix"])
def test_completions_refuse_what_they_cannot_do(field):
    assert refused(completion, **{field: 1}).param == field


def test_the_best_can_be_chosen_only_of_as_many_as_are_given():
    assert completion(best_of=2, n=2) == completion(n=2)
    assert refused(completion, best_of=2).param == refused(chat, best_of=1, n=2).param == "best_of"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -3),
        ("repetition_penalty", 0),
        ("safe_prompt", True),
        ("modalities", ["text", "audio"]),
        ("function_call", "any"),
        ("seed", 2**63),
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("max_tokens", 0),
        ("max_completion_tokens", "9"),
        ("top_logprobs", 21),
        ("stop", 5),
        ("stop", ["a"] * 17),
        ("stop", ""),
        ("stop", "a" * 501),
        ("logit_bias", [1]),
        ("stream", 1),
        ("tools", {}),
        ("tool_choice", "sometimes"),
        ("response_format", "json"),
        ("messages", []),
        ("messages", "Hello"),
        ("messages", HELLO * 10_001),
        ("model", 5),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_by_its_field(field, value):
    error = refused(chat, **{field: value})
    assert error.param.split(".")[0].split("[")[0] == field
    assert error.message.startswith(field) and error.message.endswith(".")


@pytest.mark.parametrize("bias", [{"a": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, {"٣": 1}])
def test_a_bias_names_token_ids_and_scores_within_reason(bias):
    assert refused(chat, logit_bias=bias).param.startswith("logit_bias")


def test_the_two_names_of_the_longest_answer_may_not_differ():
    assert chat(max_tokens=5).options["max_new_tokens"] == 5
    assert chat(max_completion_tokens=6).options["max_new_tokens"] == 6
    assert chat(max_tokens=7, max_completion_tokens=7).options["max_new_tokens"] == 7
    assert refused(chat, max_tokens=7, max_completion_tokens=8).param == "max_completion_tokens"


def test_logprobs_of_chats_and_of_completions():
    assert chat(logprobs=True).options["logprobs"] is True
    assert chat(logprobs=True, top_logprobs=3).options["logprobs"] == 3
    assert "logprobs" not in chat(logprobs=False).options
    assert refused(chat, top_logprobs=3).param == "top_logprobs"
    assert completion(logprobs=0).options["logprobs"] == 0
    assert refused(completion, logprobs=True).param == "logprobs"


def test_mistrals_own_words_mean_what_openais_do():
    assert chat(tool_choice="any", tools=[TOOL]) == chat(tool_choice="required", tools=[TOOL])
    assert chat(random_seed=3) == chat(seed=3) == chat(seed=3, random_seed=3)
    assert refused(chat, random_seed=3, seed=4).param == "random_seed"


def test_functions_are_the_older_form_of_tools_of_which_one_is_called():
    function = TOOL["function"]
    named = {"type": "function", "function": {"name": "add"}}
    for older, newer in ((None, None), ("auto", "auto"), ("none", "none"), ({"name": "add"}, named)):
        ask = chat(functions=[function], function_call=older)
        assert ask == dataclasses.replace(
            chat(tools=[TOOL], tool_choice=newer, parallel_tool_calls=False), older_calls=True
        )
    assert refused(chat, functions=[function], tools=[TOOL]).param == "functions"


def test_options_of_a_stream_are_only_for_streams():
    assert refused(chat, stream_options={"include_usage": True}).param == "stream_options"
    ask = chat(stream=True, stream_options={"include_usage": True})
    assert ask.stream and ask.include_usage and not ask.usage_in_each
    assert chat(stream=True, stream_options={"continuous_usage_stats": True}).usage_in_each


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_completion_has_one_prompt_or_several_of_text_or_tokens(prompt, prompts):
    ask = completion(prompt=prompt, n=2)
    assert ask.prompts == prompts
    assert ask.answers == 2 * len(prompts)


@pytest.mark.parametrize("prompt", [[], [[]], [-1], ["a", 1], [[1], "a"], [1.0], None, ["a"] * 65])
def test_other_prompts_are_refused(prompt):
    assert refused(completion, prompt=prompt).param.startswith("prompt")


def test_answers_of_one_request_are_bounded():
    assert refused(completion, prompt=["a"] * 64, n=16).param == "n"


def test_a_prediction_is_a_chat_with_its_own_defaults():
    ask = predict()
    assert ask.model is None
    assert ask.options == {"temperature": 0.7, "max_new_tokens": 512}
    assert predict(max_completion_tokens=5).options["max_new_tokens"] == 5
    assert predict(temperature=0, max_tokens=9).options == {
        "temperature": 0,
        "max_new_tokens": 9,
    }


def test_tools_and_schemas_are_passed_on_as_they_were_written():
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    choice = {"type": "function", "function": {"name": "add"}}
    ask = chat(tools=[TOOL], tool_choice=choice, response_format=schema, parallel_tool_calls=False)
    assert ask.tools == [TOOL]
    assert ask.options == {"tool_choice": choice, "response_format": schema, "parallel_tool_calls": False}


def test_messages_that_the_openai_package_gave_back_are_accepted():
    given = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
    }
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "3", "name": "add"}
    assert chat(messages=[*HELLO, given, result]).messages == [*HELLO, given, result]


def test_the_details_of_pictures_are_openais():
    for detail in ("auto", "low", "high", None):
        part = {"type": "image_url", "image_url": {"url": "data:,", "detail": detail}}
        assert chat(messages=[{"role": "user", "content": [part]}])
    part["image_url"]["detail"] = "fine"
    assert refused(chat, messages=[{"role": "user", "content": [part]}]).param == (
        "messages[0].content[0].image_url.detail"
    )


def test_pictures_are_counted_over_all_messages():
    messages = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "a"}, PICTURE]}, *HELLO]
    assert wire.count_images(chat(messages=messages).messages) == 2


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": HELLO}, {"prompt": "a", "tools": [TOOL]}])
def test_tokens_are_counted_of_a_prompt_or_of_messages(body):
    refused(tokenize, body)
    assert tokenize({"prompt": ""}).prompt == ""
    assert tokenize({"messages": HELLO, "tools": [TOOL]}).tools


def test_an_effort_is_an_option():
    assert chat(reasoning_effort="high").options == {"reasoning_effort": "high"}
    assert refused(chat, reasoning_effort="a lot").param == "reasoning_effort"
