"""Pictures of a message on the chat page: chosen, pasted, dropped, removed, priced and sent."""

from base64 import b64decode, b64encode
from io import BytesIO

from PIL import Image
from selenium.webdriver.common.keys import Keys


def sent_picture(part):
    """The bytes of an image_url part with a data: URL."""
    head, data = part["image_url"]["url"].split(",")
    assert (part["type"], head) == ("image_url", "data:image/png;base64")
    return b64decode(data)


def test_chosen_pictures_show_what_they_cost_and_go_out_whole_before_the_words(page, stub, picture, tmp_path):
    Image.new("RGB", (200, 20), "teal").save(tmp_path / "wide.png")
    page.choose(picture, tmp_path / "wide.png")
    page.until(lambda: [cost.text for cost in page.all("#pictures .cost")] == ["1,000 tokens", "1,001 tokens"])
    assert page.script("return [...document.querySelectorAll('#pictures img')].map((i) => i.naturalWidth)") == [64, 200]
    page.ask("What is it?")
    first, second, words = stub.asked[0]["messages"][0]["content"]
    assert sent_picture(first) == picture.read_bytes()
    assert sent_picture(second) == (tmp_path / "wide.png").read_bytes()
    assert words == {"type": "text", "text": "What is it?"}
    assert len(stub.priced) == 1 and not page.shows("#pictures img")
    assert [cost.text for cost in page.all(".question .cost")] == ["1,000 tokens", "1,001 tokens"]


def test_a_picture_can_be_removed_and_chosen_again(page, stub, picture):
    page.choose(picture)
    page.until(lambda: page.shows("#pictures .remove"))
    page.find("#pictures [aria-label='Remove disc.png']").send_keys(Keys.ENTER)
    assert not page.shows("#pictures img") and page.find("#send").get_property("disabled")
    assert page.browser.switch_to.active_element.get_attribute("id") == "words"
    page.choose(picture)
    page.until(lambda: page.shows("#pictures img"))
    page.ask("")
    assert [part["type"] for part in stub.asked[0]["messages"][0]["content"]] == ["image_url"]


def test_a_pasted_picture_is_one_of_the_message(page, picture):
    page.allow_clipboard()
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


def test_more_than_the_server_takes_is_said_before_it_is_sent(page, stub, tmp_path):
    (tmp_path / "huge.png").write_bytes(bytes(49 * 2**20))
    page.write("Look")
    page.choose(tmp_path / "huge.png")
    page.until(lambda: page.shows("#notice"))
    assert page.text("#notice") == "These pictures are 66 MiB to send; the server takes less than 64. Remove some."
    page.write(Keys.ENTER)
    page.find("#pictures .remove").click()
    assert not page.shows("#notice") and page.find("#words").get_attribute("value") == "Look"
    assert stub.asked == stub.priced == []
