"""One Chromium and one made-up server for all tests of the chat page; see page_stub.py for what the model says."""

import pytest
from PIL import Image
from support.chat_page import CHROMIUM, DRIVER, Page, start_chromium
from support.page_stub import Stub
from support.serving import on_thread


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver on this machine")
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def running_stub():
    stub = Stub()
    with on_thread(stub.app) as stub.url:
        yield stub


@pytest.fixture
def stub(running_stub):
    running_stub.reset()
    return running_stub


@pytest.fixture
def page(browser, stub):
    """The page, freshly opened; a test also fails on any complaint of the browser, the policy's included."""
    opened = Page(browser, stub.url)
    opened.open()
    yield opened
    assert opened.complaints() == []


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "disc.png"
    Image.new("RGB", (64, 48), "teal").save(path)
    return path
