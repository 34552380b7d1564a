"""The files of the chat page as they are served; what they do in a browser is in page/."""

from importlib.resources import files

import httpx
import pytest
from starlette.testclient import TestClient
from support.page_stub import Stub
from support.serving import on_thread

from pixtral_cli.server.static_files import FILES


def test_every_file_of_the_page_is_served_with_its_type_and_the_policy():
    names = {file.name for file in (files("pixtral_cli.server") / "page").iterdir()}
    client = TestClient(Stub().app)
    answers = {file.name: client.get(address) for address, file in FILES.items()}
    assert names <= set(answers)
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


def test_a_file_is_asked_about_with_head_without_its_content():
    with on_thread(Stub().app) as url:
        answer = httpx.head(url + "/page/chat.js")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 1000
