"""Question and answer on the chat page: sending, streaming, stopping, copying, clearing."""

import time

import pytest
from selenium.webdriver.common.keys import Keys
from support.page_stub import event

# In place of the network, which joins and parts pieces as it likes.
ANSWER_IN_PIECES = """
const [bytes, size] = arguments;
window.fetch = async () => new Response(new ReadableStream({
  start(stream) {
    for (let at = 0; at < bytes.length; at += size) stream.enqueue(new Uint8Array(bytes.slice(at, at + size)));
    stream.close();
  },
}));
"""


def test_the_model_and_its_context_are_named(page):
    page.until(lambda: page.text("#model") == "stub-12b · 128k context")


def test_each_word_is_shown_before_the_next_is_sent(page, stub):
    stub.words, stub.allowed = [" One", " word", " after", " another"], 0
    page.write("Hello" + Keys.ENTER)
    for stub.allowed, text in enumerate(["", "One", "One word", "One word after", "One word after another"]):
        page.until(lambda text=text: page.text(".answer") == text)
        assert not page.is_idle() and not page.shows(".figures")
    stub.allowed = 100
    page.until(page.is_idle)


def test_thoughts_are_folded_above_the_answer_and_sent_back_apart_from_it(page, stub):
    stub.thoughts, stub.words, stub.allowed = ["Well, ", "<b>then</b>.\n"], ["It is 3."], 2
    page.write("Hello" + Keys.ENTER)
    page.until(lambda: page.text(".thoughts summary") == "Thinking…")
    assert not page.shows(".thoughts p")
    page.find(".thoughts summary").click()
    page.until(lambda: page.text(".thoughts p") == "Well, <b>then</b>.")
    stub.allowed = 100
    page.until(page.is_idle)
    assert page.text(".thoughts summary") == "Thoughts" and page.text(".answer") == "It is 3."
    stub.thoughts = []
    page.ask("Again", exchange=2)
    said = {"role": "assistant", "content": "It is 3.", "reasoning_content": "Well, <b>then</b>.\n"}
    assert stub.asked[1]["messages"][1] == said
    assert not page.all(".thoughts")[1].is_displayed()


def test_the_figures_below_an_answer_are_the_server_s_counts_and_the_reader_s_clock(page, stub):
    stub.words, stub.pause = [" slow"] * 5, 0.1
    started = time.monotonic()
    page.ask("Hello")
    elapsed = time.monotonic() - started
    figures = page.text(".figures").split(" · ")
    assert figures[:2] == ["1,234 prompt tokens (1,000 in pictures, 100 cached)", "9 answer tokens"]
    rate, first = figures[2].removesuffix(" tokens/s"), figures[3].removeprefix("first token after ").removesuffix(" s")
    assert 8 / elapsed < float(rate) <= 8 / 0.4 + 0.1  # after the first token eight more, in the time of four pauses
    assert 0.1 <= float(first) < elapsed


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_stream_is_read_right_wherever_its_bytes_are_cut(page, size):
    wire = b": a comment\n\n" + b"".join(
        event({"choices": [{"index": 0, "delta": {"content": word}}]}) for word in ["Grüße ", "🦊 ", "日本\n", "end"]
    )
    wire = wire.replace(b"\n\n", b"\r\n\r\n", 2).replace(b'": [', b'":\r\ndata: [') + b"event: message\rdata:[DONE]\r\r"
    page.until(lambda: page.text("#model"))
    page.script(ANSWER_IN_PIECES, list(wire), size)
    page.ask("Hello")
    assert page.text(".answer") == "Grüße 🦊 日本\nend"
    assert not page.shows(".exchange .problem")


def test_the_request_streams_with_usage_and_only_the_settings_that_were_made(page, stub):
    page.ask("First")
    assert stub.asked[0] == {
        "model": "stub-12b",
        "messages": [{"role": "user", "content": "First"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.find("#settings summary").click()
    for selector, value in [("#temperature", "0.5"), ("#max-tokens", "64"), ("#system", "Be brief.")]:
        page.find(selector).send_keys(value)
    page.ask("Second", exchange=2)
    assert (stub.asked[1]["temperature"], stub.asked[1]["max_tokens"]) == (0.5, 64)
    assert stub.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "One picture says more."},
        {"role": "user", "content": "Second"},
    ]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_ends_the_request_and_keeps_what_has_come(page, stub, how):
    stub.words, stub.pause = [" slow"] * 500, 0.05
    stub.left.clear()
    page.write("Hello" + Keys.ENTER)
    page.until(lambda: "slow slow" in page.text(".answer"))
    page.find("#send").click() if how == "button" else page.write(Keys.ESCAPE)
    assert stub.left.wait(5)
    page.until(page.is_idle)
    assert page.text(".answer").startswith("slow slow") and page.text(".figures").endswith(" · stopped")
    stub.words, stub.pause = ["On."], 0
    page.ask("Again", exchange=2)
    assert stub.asked[1]["messages"][1]["content"].startswith(" slow slow")


def test_enter_sends_shift_enter_breaks_the_line_and_nothing_is_not_sent(page, stub):
    page.write("  " + Keys.ENTER)
    page.write(Keys.BACKSPACE * 2 + "One" + Keys.SHIFT + Keys.ENTER + Keys.SHIFT + "Two")
    assert page.find("#words").get_attribute("value") == "One\nTwo" and stub.asked == []
    page.write(Keys.ENTER)
    page.until(lambda: page.shows(".figures"))
    assert [asked["messages"] for asked in stub.asked] == [[{"role": "user", "content": "One\nTwo"}]]
    assert page.text(".words") == "One\nTwo" and page.find("#words").get_attribute("value") == ""


def test_an_answer_cut_off_by_its_length_says_so(page, stub):
    stub.ending = "length"
    page.ask("Hello")
    assert page.text(".figures").endswith(" · cut off at max tokens")


def test_an_answer_is_copied_as_it_was_written(page, stub):
    page.allow_clipboard()
    stub.words = ["Look:\n\n```\nx = 1\n```\n", "Done."]
    page.ask("Hello")
    page.find(".copy").click()
    page.until(lambda: page.text(".copy") == "Copied")
    read = "navigator.clipboard.readText().then(arguments[0], (error) => arguments[0](String(error)))"
    assert page.browser.execute_async_script(read) == "Look:\n\n```\nx = 1\n```\nDone."


def test_clearing_stops_the_answer_forgets_the_conversation_and_keeps_the_draft(page, stub):
    stub.words, stub.pause = [" slow"] * 500, 0.05
    stub.left.clear()
    page.write("Hello" + Keys.ENTER)
    page.until(lambda: page.text(".answer"))
    page.write("next")
    page.find("#clear").click()
    assert stub.left.wait(5)
    assert page.all(".exchange") == [] and page.shows("#welcome") and not page.shows("#clear")
    stub.words, stub.pause = ["Yes."], 0
    page.ask("")
    assert stub.asked[1]["messages"] == [{"role": "user", "content": "next"}]


def test_an_example_fills_in_the_message(page, stub):
    page.all(".example")[1].click()
    assert page.find("#words").get_attribute("value") == "Hello! What can you do?"
    page.ask("")
    assert stub.asked[0]["messages"][0]["content"] == "Hello! What can you do?"
