"""What stands before the app lets the right requests through, and tells the others why in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hmac

import httpx
import openai
import pytest
from support.guarded_server import ask, guarded_port

from pixtral_cli.errors import PixtralError
from pixtral_cli.server import middleware
from pixtral_cli.server.middleware import ApiKeys, RequestTracker, is_loopback
from pixtral_cli.server.process import check_binding

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def keyed():
    with guarded_port(keys=KEYS) as port:
        yield port


@pytest.fixture(scope="module")
def local():
    with guarded_port() as port:
        yield port


def error_of(answer):
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return answer["error"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", [{"Authorization": "Bearer {}"}, {"Authorization": "api-key {}"}, {"Api_Key": "{}"}])
def test_every_key_opens_in_every_form(keyed, key, form):
    status, _, answer = ask(keyed, **{name: value.format(key) for name, value in form.items()})
    assert (status, answer["path"]) == (200, "/v1/models")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer first-keyx"},
        {"Authorization": "Bearer first-ke"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "first-key"},
        {"Authorization": "Bearer first-key second-key"},
        {"Api_Key": "FIRST-KEY"},
    ],
    ids=str,
)
def test_without_a_key_the_answer_is_401_and_never_repeats_what_was_tried(keyed, headers):
    status, answered, answer = ask(keyed, **headers)
    assert status == 401 and answered["www-authenticate"] == "Bearer" and "x-app" not in answered
    assert error_of(answer)["type"] == "authentication_error"
    assert "first" not in answer["error"]["message"].lower()


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/page/chat.js"])
def test_the_open_paths_need_no_key(keyed, path):
    assert ask(keyed, path=path)[0] == 200


@pytest.mark.parametrize(
    "path", ["/metrics", "/docs", "/openapi.json", "/version", "/v1/models", "/pages", "/page", "//", "/health/", "/x"]
)
def test_every_other_path_needs_one(keyed, path):
    assert ask(keyed, path=path)[0] == 401


def test_an_open_path_is_open_for_reading_only(keyed):
    assert ask(keyed, "POST", "/health", b"{}")[0] == 401


def test_a_large_body_without_a_key_is_answered_before_it_is_read(keyed):
    status, _, answer = ask(keyed, "POST", "/v1/chat/completions", bytes(20 * 2**20))
    assert status == 401 and error_of(answer)


def test_openais_client_sees_an_authentication_error(keyed):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{keyed}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 5_000_000}])
    assert caught.value.code == "invalid_api_key"


def test_two_keys_have_different_salts_and_one_key_one(keyed):
    salts = [ask(keyed, Authorization=f"Bearer {key}")[2]["salt"] for key in (*KEYS, KEYS[0])]
    assert salts[0] == salts[2] != salts[1] and salts[0]
    assert KEYS[0].encode().hex() not in salts[0]


@pytest.mark.parametrize("given", [b"first-key", b"second-key", b"none"])
def test_a_key_is_compared_with_all_keys_by_digests_of_one_length(monkeypatch, given):
    compared = []

    def counting(one, other):
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    keys = ApiKeys(KEYS)
    monkeypatch.setattr(middleware, "hmac", type("", (), {"compare_digest": staticmethod(counting)}))
    assert keys.knows(given) == (given.decode() in KEYS)
    assert compared == [(32, 32)] * len(KEYS)


def test_every_answer_tells_browsers_what_to_hold_to_but_keeps_its_own_headers(local):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"max-age=5")]})
        await send({"type": "http.response.body", "body": b"{}"})

    with guarded_port(app) as port:
        assert ask(port)[1]["cache-control"] == "max-age=5"
    for answered in (ask(local)[1], ask(local, Host="evil.example")[1]):
        assert answered["x-content-type-options"] == "nosniff" and answered["cache-control"] == "no-store"
        assert "default-src 'none'" in answered["content-security-policy"]
        assert "access-control-allow-origin" not in answered


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    check_binding(host, (), False)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "no-such-host.invalid"])
def test_another_address_without_a_key_is_refused_with_the_ways_out(host):
    with pytest.raises(PixtralError) as caught:
        check_binding(host, (), False)
    assert all(way in caught.value.hint for way in ("--api-key", "PIXTRAL_API_KEY", "--insecure"))
    check_binding(host, KEYS, False)
    check_binding(host, (), True)


@pytest.mark.parametrize("key", ["", "  ", "schlüssel", "a\nb"])
def test_a_key_that_no_client_could_send_or_that_is_empty_is_refused(key):
    with pytest.raises(PixtralError, match="empty"):
        check_binding("127.0.0.1", (key,), True)


def test_before_the_model_is_there_it_lives_but_is_not_ready():
    async def ask():
        tracker = RequestTracker(lambda line: None)
        transport = httpx.ASGITransport(tracker)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get("/health"), await client.get("/ready"), await client.post("/predict", json={})]

    health, *others = asyncio.run(ask())
    assert health.status_code == 200
    assert [(each.status_code, each.json()["error"]["code"]) for each in others] == [(503, "loading")] * 2
    assert all(int(each.headers["retry-after"]) > 0 for each in others)


def test_a_bug_behind_it_is_told_and_answered_with_500(caplog):
    async def broken(scope, receive, send):
        raise ZeroDivisionError("a bug")

    async def ask():
        tracker = RequestTracker(lambda line: None)
        tracker.begin(broken, lambda route, status: None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(tracker), base_url="http://localhost") as client:
            return await client.get("/v1/models")

    answer = asyncio.run(ask())
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "a bug" not in answer.text and "A request failed" in caplog.text
