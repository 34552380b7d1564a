"""The chat page in a real Chromium, before a server that is made up: see page_stub.py for what the model says."""

import json
import shutil
import time
from base64 import b64decode, b64encode
from io import BytesIO

import httpx
import pytest
from page_stub import Stub, event, serving
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from starlette.testclient import TestClient

from pixtral_cli.server.page import FILES

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine")


@pytest.fixture(scope="module")
def server():
    stub = Stub()
    with serving(stub.app) as stub.url:
        yield stub


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """The page, freshly opened; a test also fails on any complaint of the browser, the policy's included."""
    server.reset()
    opened = Page(browser, server.url)
    opened.open()
    yield opened
    assert opened.complaints() == []


class Page:
    """What a reader can do and see."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def open(self):
        """Anew: without a key, nothing written, nothing in the console."""
        self.browser.get(self.url)
        if self.script("return sessionStorage.length"):
            self.script("sessionStorage.clear()")
            self.browser.refresh()
        self.complaints()

    def complaints(self):
        """What the console holds, but for the answers 400, 401, … that the server gave on purpose."""
        return [entry for entry in self.browser.get_log("browser") if entry["source"] != "network"]

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text.replace("\xa0", " ")

    def script(self, source, *arguments):
        return self.browser.execute_script(source, *arguments)

    def until(self, promise, seconds=10):
        return WebDriverWait(self.browser, seconds, 0.02).until(lambda _: promise())

    def write(self, words):
        self.find("#words").send_keys(words)

    def ask(self, words, turn=1):
        """Send `words` and wait for the end of the answer, which is the conversation's `turn`-th."""
        self.write(words + Keys.ENTER)
        self.until(lambda: self.is_idle() and len(self.all(".turn")) == turn)

    def is_idle(self):
        return self.find("#send").get_attribute("aria-label") == "Send"

    def choose(self, *files):
        self.find("#files").send_keys("\n".join(map(str, files)))

    def shows(self, selector):
        return any(element.is_displayed() for element in self.all(selector))


@pytest.fixture
def picture(tmp_path):
    return picture_at(tmp_path / "disc.png")


def picture_at(path, size=(64, 48)):
    Image.new("RGB", size, "teal").save(path)
    return path


def sent_picture(part):
    """The bytes of an image_url part with a data: URL."""
    head, data = part["image_url"]["url"].split(",")
    assert (part["type"], head) == ("image_url", "data:image/png;base64")
    return b64decode(data)


# What is served


def test_every_file_of_the_page_is_served_with_its_type_and_the_policy():
    from importlib.resources import files

    names = {file.name for file in (files("pixtral_cli.server") / "page").iterdir()}
    client = TestClient(Stub().app)
    answers = {FILES[address][0]: client.get(address) for address in FILES}
    assert set(answers) == names
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for name, answer in answers.items():
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kinds[name[name.rindex(".") :]] + "; charset=utf-8"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("spelling", ["{}", "W/{}", '"other", {}', "*"])
def test_a_file_that_the_browser_still_has_is_not_sent_again(spelling):
    client = TestClient(Stub().app)
    etag = client.get("/").headers["etag"]
    again = client.get("/", headers={"If-None-Match": spelling.format(etag)})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_file_is_asked_about_with_head_without_its_content(server):
    answer = httpx.head(server.url + "/page/chat.js")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 1000


# In the browser


@in_browser
def test_the_model_and_its_context_are_named(page):
    page.until(lambda: page.text("#model") == "stub-12b · 128k context")


@in_browser
def test_words_appear_one_after_another_and_then_the_figures(page, server):
    server.words, server.pause = [" slow"] * 12, 0.08
    page.write("Hello" + Keys.ENTER)
    seen = []
    while not seen or seen[-1] != " ".join(["slow"] * 12):
        text = page.until(lambda: page.text(".answer")) if not seen else page.text(".answer")
        if not seen or seen[-1] != text:
            seen.append(text)
    assert len(seen) >= 5 and all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False))
    page.until(lambda: page.shows(".figures"))
    figures = page.text(".figures")
    assert figures.startswith("1,234 prompt tokens (1,000 in pictures, 100 cached) · 9 answer tokens · ")
    rate, first = [figures.split(" · ")[index] for index in (2, 3)]
    assert 4 < float(rate.removesuffix(" tokens/s")) < 10  # 8 tokens in 11 pauses of 0.08 s and a little more
    assert 0.08 <= float(first.removeprefix("first token after ").removesuffix(" s")) < 1


@in_browser
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_stream_is_read_right_wherever_its_bytes_are_cut(page, size):
    wire = b": a comment\n\n" + b"".join(
        event({"choices": [{"index": 0, "delta": {"content": word}}]}) for word in ["Grüße ", "🦊 ", "日本\n", "end"]
    )
    wire = wire.replace(b"\n\n", b"\r\n\r\n", 2) + b"event: message\rdata:[DONE]\r\r"
    page.until(lambda: page.text("#model"))
    page.script(ANSWER_IN_PIECES, list(wire), size)
    page.ask("Hello")
    assert page.text(".answer") == "Grüße 🦊 日本\nend"
    assert not page.shows(".turn .problem")


@in_browser
def test_the_request_streams_with_usage_and_only_the_settings_that_were_made(page, server):
    page.ask("First")
    assert server.asked[0] == {
        "model": "stub-12b",
        "messages": [{"role": "user", "content": "First"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.find("#settings summary").click()
    for selector, value in [("#temperature", "0.5"), ("#max-tokens", "64"), ("#system", "Be brief.")]:
        page.find(selector).send_keys(value)
    page.ask("Second", turn=2)
    assert (server.asked[1]["temperature"], server.asked[1]["max_tokens"]) == (0.5, 64)
    assert server.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "One picture says more."},
        {"role": "user", "content": "Second"},
    ]


@in_browser
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_ends_the_request_and_keeps_what_has_come(page, server, how):
    server.words, server.pause = [" slow"] * 500, 0.05
    server.left.clear()
    page.write("Hello" + Keys.ENTER)
    page.until(lambda: "slow slow" in page.text(".answer"))
    page.find("#send").click() if how == "button" else page.write(Keys.ESCAPE)
    assert server.left.wait(5)
    page.until(page.is_idle)
    assert page.text(".answer").startswith("slow slow") and page.text(".figures").endswith(" · stopped")
    server.words, server.pause = ["On."], 0
    page.ask("Again", turn=2)
    assert server.asked[1]["messages"][1]["content"].startswith(" slow slow")


@in_browser
def test_enter_sends_shift_enter_breaks_the_line_and_nothing_is_not_sent(page, server):
    page.write("  " + Keys.ENTER)
    page.write(Keys.BACKSPACE * 2 + "One" + Keys.SHIFT + Keys.ENTER + Keys.SHIFT + "Two")
    assert page.find("#words").get_attribute("value") == "One\nTwo" and server.asked == []
    page.write(Keys.ENTER)
    page.until(lambda: page.shows(".figures"))
    assert [asked["messages"] for asked in server.asked] == [[{"role": "user", "content": "One\nTwo"}]]
    assert page.text(".words") == "One\nTwo" and page.find("#words").get_attribute("value") == ""


@in_browser
def test_chosen_pictures_show_what_they_cost_and_go_out_whole_before_the_words(page, server, picture, tmp_path):
    page.choose(picture, picture_at(tmp_path / "wide.png", (200, 20)))
    page.until(lambda: [cost.text for cost in page.all("#pictures .cost")] == ["1,000 tokens", "1,001 tokens"])
    assert page.script("return [...document.querySelectorAll('#pictures img')].map((i) => i.naturalWidth)") == [64, 200]
    page.ask("What is it?")
    first, second, words = server.asked[0]["messages"][0]["content"]
    assert sent_picture(first) == picture.read_bytes()
    assert sent_picture(second) == (tmp_path / "wide.png").read_bytes()
    assert words == {"type": "text", "text": "What is it?"}
    assert len(server.priced) == 1 and not page.shows("#pictures img")
    assert [cost.text for cost in page.all(".question .cost")] == ["1,000 tokens", "1,001 tokens"]


@in_browser
def test_a_picture_can_be_removed_and_chosen_again(page, server, picture):
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .remove"))
    page.find("#pictures [aria-label='Remove disc.png']").send_keys(Keys.ENTER)
    assert not page.shows("#pictures img") and page.find("#send").get_property("disabled")
    assert page.browser.switch_to.active_element.get_attribute("id") == "words"
    page.choose(picture)
    page.until(lambda: page.shows("#pictures img"))
    page.ask("")
    assert [part["type"] for part in server.asked[0]["messages"][0]["content"]] == ["image_url"]


@in_browser
def test_a_pasted_picture_is_one_of_the_message(page, picture):
    allow_clipboard(page)
    copied = page.browser.execute_async_script(
        """const [data, done] = arguments;
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})])
          .then(() => done(""), (error) => done(String(error)))""",
        b64encode(picture.read_bytes()).decode(),
    )
    assert copied == ""
    page.write(Keys.CONTROL + "v")
    page.until(lambda: page.text("#pictures .cost") == "1,000 tokens")
    assert page.find("#words").get_attribute("value") == ""


@in_browser
def test_dropped_pictures_are_taken_and_other_files_are_named(page):
    data = BytesIO()
    Image.new("RGB", (8, 8)).save(data, "png")
    page.script(
        """const files = new DataTransfer();
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        files.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        files.items.add(new File(["words"], "notes.txt", {type: "text/plain"}));
        for (const kind of ["dragover", "drop"]) document.querySelector("main").dispatchEvent(
          new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true}))""",
        b64encode(data.getvalue()).decode(),
    )
    page.until(lambda: page.text("#notice") == "notes.txt is not a picture.")
    assert [image.get_attribute("alt") for image in page.all("#pictures img")] == ["dropped.png"]
    assert page.all(".dropping") == []
    page.until(lambda: page.text("#pictures .cost") == "1,000 tokens")


@in_browser
def test_more_than_the_server_takes_is_said_before_it_is_sent(page, server, tmp_path):
    (tmp_path / "huge.png").write_bytes(bytes(49 * 2**20))
    page.write("Look")
    page.choose(tmp_path / "huge.png")
    page.until(lambda: page.shows("#notice"))
    assert page.text("#notice") == "These pictures are 66 MiB to send; the server takes less than 64. Remove some."
    page.write(Keys.ENTER)
    page.find("#pictures .remove").click()
    assert not page.shows("#notice") and page.find("#words").get_attribute("value") == "Look"
    assert server.asked == server.priced == []


@in_browser
def test_the_key_is_asked_for_kept_for_the_tab_and_sent(page, server):
    server.key = "sesame"
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


@in_browser
def test_without_a_key_the_refusal_is_said_and_can_be_tried_again(page, server):
    server.key = "sesame"
    page.browser.refresh()
    page.until(lambda: page.shows("#key-dialog"))
    page.find("#key").send_keys(Keys.ESCAPE)
    page.until(lambda: "not one of the server's" in page.text("#notice span"))
    page.find("#notice button").click()
    page.until(lambda: page.shows("#key-dialog"))
    page.find("#key").send_keys("sesame" + Keys.ENTER)
    page.until(lambda: page.text("#model").startswith("stub-12b") and not page.shows("#notice"))


@in_browser
def test_an_error_is_a_sentence_and_trying_again_sends_the_same(page, server, picture):
    server.error = (400, "The prompt is too long.")
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .cost"))
    page.ask("What is it?")
    assert page.text(".turn .problem span") == "The prompt is too long." and page.text(".words") == "What is it?"
    server.error = None
    page.find(".retry").click()
    page.until(lambda: page.text(".answer") == "One picture says more." and page.is_idle())
    assert server.asked[0] == server.asked[1] and not page.shows(".turn .problem")


@in_browser
def test_editing_a_failed_question_gives_back_its_words_and_pictures(page, server, picture):
    server.error = (500, "Something broke.")
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .cost"))
    page.ask("What is it?")
    page.write("and then")
    page.find(".edit").click()
    assert page.find("#words").get_attribute("value") == "What is it?\nand then"
    assert page.shows("#pictures img") and page.all(".turn") == []


@in_browser
def test_a_failed_question_is_not_part_of_the_next_request(page, server):
    server.error = (429, "Too many ask at once.")
    page.ask("First")
    server.error = None
    page.ask("Second", turn=2)
    assert server.asked[1]["messages"] == [{"role": "user", "content": "Second"}]


@in_browser
def test_an_answer_that_breaks_off_is_kept_and_said_to_be_incomplete(page, server):
    server.ending, server.pause = "lost", 0.05
    page.ask("Hello")
    assert page.text(".answer") == "One picture says more."
    assert "lost before the answer was complete" in page.text(".turn .problem span")
    assert page.shows(".retry") and page.text(".words") == "Hello"


@in_browser
def test_an_error_in_the_middle_of_the_stream_is_said(page, server):
    first = event({"choices": [{"index": 0, "delta": {"content": "Half"}}]})
    server.pieces = [first, event({"error": {"message": "Out of memory.", "type": "server_error"}})]
    page.ask("Hello")
    assert (page.text(".answer"), page.text(".turn .problem span")) == ("Half", "Out of memory.")


@in_browser
def test_an_answer_cut_off_by_its_length_says_so(page, server):
    server.ending = "length"
    page.ask("Hello")
    assert page.text(".figures").endswith(" · cut off at max tokens")


@in_browser
def test_a_server_that_is_gone_is_said_and_the_question_waits_for_its_return(page):
    stub = Stub()
    with serving(stub.app) as url:
        gone = Page(page.browser, url)
        gone.open()
        gone.until(lambda: gone.text("#model").startswith("stub-12b"))
    gone.ask("Anyone there?")
    assert gone.text(".turn .problem span") == "The server cannot be reached. Is it still running?"
    with serving(stub.app, port=int(url.rpartition(":")[2])):
        gone.find(".retry").click()
        gone.until(lambda: gone.text(".answer") == "One picture says more.")


@in_browser
def test_what_the_model_writes_is_text_never_markup(page, server):
    attack = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    server.words = [attack[:20], attack[20:], "\n```html\n<b>bold</b>\n", "```\nEnd"]
    page.ask(attack)
    assert page.text(".answer p") == attack and page.text(".words") == attack
    assert page.text(".answer pre") == "<b>bold</b>" and page.text(".answer p:last-child") == "End"
    assert page.all(".answer b, .turn script, .answer img") == [] and page.browser.title == "stub-12b · pixtral"


@in_browser
def test_the_policy_stops_a_script_in_the_page(page):
    page.script(
        "const script = document.createElement('script'); script.textContent = 'document.title = \"owned\"';"
        "document.body.append(script)"
    )
    assert page.browser.title != "owned"
    assert "Content Security Policy" in json.dumps(page.complaints())  # so `page` would have failed any other test


@in_browser
def test_an_answer_is_copied_as_it_was_written(page, server):
    allow_clipboard(page)
    server.words = ["Look:\n\n```\nx = 1\n```\n", "Done."]
    page.ask("Hello")
    page.find(".copy").click()
    page.until(lambda: page.text(".copy") == "Copied")
    read = "navigator.clipboard.readText().then(arguments[0], (error) => arguments[0](String(error)))"
    assert page.browser.execute_async_script(read) == "Look:\n\n```\nx = 1\n```\nDone."


@in_browser
def test_clearing_stops_the_answer_forgets_the_conversation_and_keeps_the_draft(page, server):
    server.words, server.pause = [" slow"] * 500, 0.05
    server.left.clear()
    page.write("Hello" + Keys.ENTER)
    page.until(lambda: page.text(".answer"))
    page.write("next")
    page.find("#clear").click()
    assert server.left.wait(5)
    assert page.all(".turn") == [] and page.shows("#welcome") and not page.shows("#clear")
    server.words, server.pause = ["Yes."], 0
    page.ask("")
    assert server.asked[1]["messages"] == [{"role": "user", "content": "next"}]


@in_browser
def test_an_example_fills_in_the_message(page, server):
    page.all(".example")[1].click()
    assert page.find("#words").get_attribute("value") == "Hello! What can you do?"
    page.ask("")
    assert server.asked[0]["messages"][0]["content"] == "Hello! What can you do?"


@in_browser
def test_everything_is_reached_with_the_tab_key_and_has_a_name(page, picture):
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .cost"))
    page.ask("Hello")
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .cost"))
    page.find("h1").click()  # from here on
    reached = []
    for _ in range(8):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        element = page.browser.switch_to.active_element
        ring = page.script(
            "const box = arguments[0].closest('.box');"
            "return [arguments[0], ...(box ? [box] : [])].some((e) => getComputedStyle(e).outlineStyle !== 'none')",
            element,
        )
        reached.append((element.accessible_name, ring))
    names = ["Clear", "Copy", "Remove disc.png", "Message", "Pictures", "Settings", "Send"]
    assert [name for name in reached if name[0] in names] == [(name, True) for name in names]


@in_browser
@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_wider_than_the_window_and_no_field_makes_a_phone_zoom(page, server, picture, width):
    server.words = ["a" * 300 + " \n```\n" + "b" * 300 + "\n```\n"]
    emulated(page, "setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=1, mobile=width < 500)
    try:
        page.choose(picture, picture, picture)
        page.until(lambda: len(page.all("#pictures .cost")) == 3)
        page.ask("c" * 300)
        page.find("#settings summary").click()
        assert page.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        script = "return [...document.querySelectorAll('input, textarea')].map((e) => getComputedStyle(e).fontSize)"
        assert set(page.script(script)) == {"16px"}
        box, end = page.find(".box").rect, page.script("return innerHeight")
        assert end - 40 < box["y"] - page.script("return scrollY") + box["height"] <= end  # at the lower edge
    finally:
        emulated(page, "clearDeviceMetricsOverride")


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_schemes(page, server, picture, scheme):
    emulated(page, "setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        page.choose(picture)
        page.until(lambda: page.shows("#pictures .cost"))
        server.ending = "lost"
        page.ask("Hello")
        page.find("#settings summary").click()
        time.sleep(0.3)  # colours move for 0.15 s
        texts = page.script(CONTRASTS)
        assert len(texts) >= 10 and [text for text in texts if text[1] < 4.5] == []
        ground = page.script("return getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(channels(ground)) > 600) == (scheme == "light")
    finally:
        emulated(page, "setEmulatedMedia", features=[])


@in_browser
def test_nothing_moves_for_those_who_want_it_still(page, server):
    server.words, server.pause = [" slow"] * 500, 0.05
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    moving = "return document.getAnimations().length"
    try:
        for features, expected in [([still], False), ([], True)]:
            emulated(page, "setEmulatedMedia", features=features)
            page.open()
            page.write("Hello" + Keys.ENTER)
            page.until(lambda: page.text(".answer"))
            assert (page.script(moving) > 0) == expected
    finally:
        emulated(page, "setEmulatedMedia", features=[])


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


def emulated(page, command, **values):
    page.browser.execute_cdp_cmd(f"Emulation.{command}", values)


def allow_clipboard(page):
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.url}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", allowed)


def channels(colour):
    """The three channels of "rgb(1, 2, 3)"."""
    return [float(channel) for channel in colour[colour.index("(") + 1 : -1].split(",")[:3]]


# WCAG 2.2's contrast ratio of each visible text to the nearest opaque ground behind it.
CONTRASTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = (rgb) => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const holds = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
return [...document.querySelectorAll("body *")].filter((e) => holds(e) && e.checkVisibility()).map((e) => {
  const [a, b] = [light(channels(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
  return [e.textContent.trim(), (a + 0.05) / (b + 0.05)];
});
"""
