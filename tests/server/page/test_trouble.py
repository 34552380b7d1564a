"""What the chat page does when something is refused, breaks or means harm: nothing that was written is lost."""

import json

import pytest
from selenium.webdriver.common.keys import Keys
from support.chat_page import Page
from support.page_stub import Stub, event
from support.serving import on_thread


def test_the_key_is_asked_for_kept_for_the_tab_and_sent(page, stub):
    stub.key = "sesame"
    page.browser.refresh()
    page.until(lambda: page.shows("#key-dialog"))
    page.find("#key").send_keys("wrong" + Keys.ENTER)
    page.until(lambda: page.text("#key-reason") == "This key is not one of the server's.")
    page.find("#key").send_keys("sesame" + Keys.ENTER)
    page.until(lambda: page.text("#model").startswith("stub-12b"))
    page.ask("Hello")
    assert page.text(".answer") == "One picture says more."
    page.browser.refresh()
    page.until(lambda: page.text("#model").startswith("stub-12b"))
    assert not page.shows("#key-dialog") and page.script("return localStorage.length") == 0


def test_without_a_key_the_refusal_is_said_and_can_be_tried_again(page, stub):
    stub.key = "sesame"
    page.browser.refresh()
    page.until(lambda: page.shows("#key-dialog"))
    page.find("#key").send_keys(Keys.ESCAPE)
    page.until(lambda: "not one of the server's" in page.text("#notice span"))
    page.find("#notice button").click()
    page.until(lambda: page.shows("#key-dialog"))
    page.find("#key").send_keys("sesame" + Keys.ENTER)
    page.until(lambda: page.text("#model").startswith("stub-12b") and not page.shows("#notice"))


def test_an_error_is_a_sentence_and_trying_again_sends_the_same(page, stub, picture):
    stub.error = (400, "The prompt is too long.")
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .cost"))
    page.ask("What is it?")
    assert page.text(".exchange .problem span") == "The prompt is too long." and page.text(".words") == "What is it?"
    stub.error = None
    page.find(".retry").click()
    page.until(lambda: page.text(".answer") == "One picture says more." and page.is_idle())
    assert stub.asked[0] == stub.asked[1] and not page.shows(".exchange .problem")


def test_editing_a_failed_question_gives_back_its_words_and_pictures(page, stub, picture):
    stub.error = (500, "Something broke.")
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .cost"))
    page.ask("What is it?")
    page.write("and then")
    page.find(".edit").click()
    assert page.find("#words").get_attribute("value") == "What is it?\nand then"
    assert page.shows("#pictures img") and page.all(".exchange") == []


def test_a_failed_question_is_not_part_of_the_next_request(page, stub):
    stub.error = (429, "Too many ask at once.")
    page.ask("First")
    stub.error = None
    page.ask("Second", exchange=2)
    assert stub.asked[1]["messages"] == [{"role": "user", "content": "Second"}]


@pytest.mark.parametrize("ending", ["lost", "silent"])
def test_an_answer_that_breaks_off_is_kept_and_said_to_be_incomplete(page, stub, ending):
    stub.ending, stub.pause = ending, 0.05
    page.ask("Hello")
    assert page.text(".answer") == "One picture says more."
    assert "lost before the answer was complete" in page.text(".exchange .problem span")
    assert page.shows(".retry") and page.text(".words") == "Hello"


def test_an_error_in_the_middle_of_the_stream_is_said(page, stub):
    first = event({"choices": [{"index": 0, "delta": {"content": "Half"}}]})
    stub.pieces = [first, event({"error": {"message": "Out of memory.", "type": "server_error"}})]
    page.ask("Hello")
    assert (page.text(".answer"), page.text(".exchange .problem span")) == ("Half", "Out of memory.")


def test_a_server_that_is_gone_is_said_and_the_question_waits_for_its_return(page):
    stub = Stub()
    with on_thread(stub.app) as url:
        gone = Page(page.browser, url)
        gone.open()
        gone.until(lambda: gone.text("#model").startswith("stub-12b"))
    gone.ask("Anyone there?")
    assert gone.text(".exchange .problem span") == "The server cannot be reached. Is it still running?"
    with on_thread(stub.app, port=int(url.rpartition(":")[2])):
        gone.find(".retry").click()
        gone.until(lambda: gone.text(".answer") == "One picture says more.")


def test_what_the_model_writes_is_text_never_markup(page, stub):
    attack = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    stub.words = [attack[:20], attack[20:], "\n```html\n<b>bold</b>\n", "```\nEnd"]
    page.ask(attack)
    assert page.text(".answer p") == attack and page.text(".words") == attack
    assert page.text(".answer pre") == "<b>bold</b>" and page.text(".answer p:last-child") == "End"
    assert page.all(".answer b, .exchange script, .answer img") == [] and page.browser.title == "stub-12b · pixtral"


def test_the_policy_stops_a_script_in_the_page(page):
    page.script(
        "const script = document.createElement('script'); script.textContent = 'document.title = \"owned\"';"
        "document.body.append(script)"
    )
    assert page.browser.title != "owned"
    assert "Content Security Policy" in json.dumps(page.complaints())  # so `page` would have failed any other test
