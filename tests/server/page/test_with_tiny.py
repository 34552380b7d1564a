"""The chat page, the real server and the built-in model together."""

import itertools

from PIL import Image, ImageDraw
from selenium.webdriver.common.keys import Keys
from support.chat_page import Page


def test_a_question_about_a_picture_is_answered_in_words_that_arrive(browser, server, tmp_path):
    scene = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(scene).ellipse((32, 32, 96, 96), fill=(220, 40, 40))
    scene.save(tmp_path / "scene.png")
    page = Page(browser, server.url)
    page.open()
    page.until(lambda: page.text("#model").startswith("tiny"))
    page.choose(tmp_path / "scene.png")
    page.until(lambda: page.text("#pictures .cost").endswith(" tokens"))
    cost = page.text("#pictures .cost").removesuffix(" tokens")
    page.script(RECORD)
    page.write("Describe the picture." + Keys.ENTER)
    page.until(lambda: page.shows(".figures"), seconds=60)
    seen = page.script("return seen")
    assert len(seen) >= 2 and all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    assert seen[-1] == page.text(".answer") and "red" in seen[-1]
    assert f"({cost} in pictures" in page.text(".figures")
    assert page.complaints() == []


def test_the_description_of_the_api_can_be_tried_out_and_asks_nothing_of_other_servers(browser, server):
    page = Page(browser, server.url + "/docs")
    page.open()
    page.until(lambda: len(page.all(".opblock")) == 11)
    page.find("#operations-default-tokenize .opblock-summary-control").click()
    page.until(lambda: page.shows("#operations-default-tokenize .try-out__btn"))
    page.find("#operations-default-tokenize .try-out__btn").click()
    page.find("#operations-default-tokenize .execute").click()
    page.until(lambda: page.shows("#operations-default-tokenize .live-responses-table"))
    assert "max_model_len" in page.text("#operations-default-tokenize .live-responses-table")
    asked = page.script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(address.startswith(server.url) for address in asked)
    assert page.complaints() == []


# Every different text of the answer, in order, as the page draws it.
RECORD = """
window.seen = [];
new MutationObserver(() => {
  const text = document.querySelector(".answer")?.textContent;
  if (text && text !== seen.at(-1)) seen.push(text);
}).observe(document.querySelector("#conversation"), {childList: true, subtree: true, characterData: true});
"""
