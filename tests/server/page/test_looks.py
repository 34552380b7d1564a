"""How the chat page stands on a phone, in the dark, on the keyboard and for those who want no motion."""

import time

import pytest
from selenium.webdriver.common.keys import Keys

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


def channels(colour):
    """The three channels of "rgb(1, 2, 3)"."""
    return [float(channel) for channel in colour[colour.index("(") + 1 : -1].split(",")[:3]]


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


@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_wider_than_the_window_and_no_field_makes_a_phone_zoom(page, stub, picture, width):
    stub.words = ["a" * 300 + " \n```\n" + "b" * 300 + "\n```\n"]
    page.emulated("setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=1, mobile=width < 500)
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
        page.emulated("clearDeviceMetricsOverride")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_schemes(page, stub, picture, scheme):
    page.emulated("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        page.choose(picture)
        page.until(lambda: page.shows("#pictures .cost"))
        stub.ending = "lost"
        page.ask("Hello")
        page.find("#settings summary").click()
        time.sleep(0.3)  # colours move for 0.15 s
        texts = page.script(CONTRASTS)
        assert len(texts) >= 10 and [text for text in texts if text[1] < 4.5] == []
        ground = page.script("return getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(channels(ground)) > 600) == (scheme == "light")
    finally:
        page.emulated("setEmulatedMedia", features=[])


def test_nothing_moves_for_those_who_want_it_still(page, stub):
    stub.words, stub.pause = [" slow"] * 500, 0.05
    moving = "return document.getAnimations().length"
    try:
        for wish, expected in [("reduce", False), ("no-preference", True)]:
            page.emulated("setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": wish}])
            page.open()
            page.write("Hello" + Keys.ENTER)
            page.until(lambda: page.text(".answer"))
            assert (page.script(moving) > 0) == expected
    finally:
        page.emulated("setEmulatedMedia", features=[])


def test_who_has_scrolled_up_is_left_in_peace_and_who_reads_at_the_end_stays_there(page, stub):
    stub.words, stub.allowed = ["line\n"] * 200, 100
    page.write("Hello" + Keys.ENTER)
    page.until(lambda: page.text(".answer").count("line") == 100)
    left = "return document.documentElement.scrollHeight - innerHeight - scrollY"
    assert page.script(left) < 2
    page.script("scrollTo(0, 300)")
    stub.allowed = 300
    page.until(page.is_idle)
    assert page.script("return scrollY") == 300 and page.script(left) > 1000
