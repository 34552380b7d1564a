"""A server's pictures come from a request, the web or one folder, and from nowhere else."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import threading
from ipaddress import ip_network

import numpy as np
import pytest
from PIL import Image
from support.web_server import names, web

from pixtral_cli.prompt import media
from pixtral_cli.prompt.errors import (
    ImageDamaged,
    ImageError,
    ImageFetchFailed,
    ImageNotFound,
    ImageRefused,
    ImageTooLarge,
    ImageUnreadable,
)
from pixtral_cli.server.errors import refusal_of
from pixtral_cli.server.media_policy import MediaPolicy, RequestImages
from pixtral_cli.server.threads import Threads

NOISE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8))
LOOPBACK = (ip_network("127.0.0.0/8"),)


def encoded(image: Image.Image = NOISE, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


PNG = encoded()
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(autouse=True)
def pils_own_limit(monkeypatch):
    """A server takes it away for its whole process; this process has other tests."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def same(picture):
    return picture.mode == "RGB" and picture.tobytes() == NOISE.tobytes()


def loader(policy):
    """A function that gives the picture, and its turn to the next."""

    def load(source):
        with pictures.opened(source) as picture:
            return picture

    pictures = RequestImages(policy)
    return load


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "a b.png").write_bytes(PNG)
    (root / "sub" / "c.png").write_bytes(PNG)
    (root / "inner.png").symlink_to(root / "sub" / "c.png")
    (tmp_path / "outside.png").write_bytes(PNG)
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "x.png").write_bytes(PNG)
    return root


def test_a_data_uri_is_a_picture():
    assert same(loader(MediaPolicy())(URI))


def test_files_below_the_media_path_are_read_by_address_and_by_name(folder, monkeypatch):
    monkeypatch.chdir("/")
    load = loader(MediaPolicy(media_path=folder))
    names = ["a b.png", "sub/c.png", "./sub/../a b.png", "inner.png", f"file://{folder}/a%20b.png"]
    names += [f"file://localhost{folder}/sub/c.png", f"FILE://{folder}/inner.png"]
    assert all(same(load(name)) for name in names)


def test_a_media_path_that_is_itself_a_link_is_fine(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    load = loader(MediaPolicy(media_path=tmp_path / "link"))
    assert same(load("sub/c.png")) and same(load(f"file://{tmp_path}/link/sub/c.png"))


@pytest.fixture
def escapes(folder, tmp_path):
    """Names that lead out of the folder, or to what is no file."""
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "etc").symlink_to("/etc")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "gone").symlink_to(tmp_path / "gone.png")
    os.mkfifo(folder / "pipe")
    (folder / "~").mkdir()
    (folder / "-").write_bytes(PNG)
    return [
        "../outside.png", "sub/../../outside.png", "out.png", "up/outside.png", "etc/passwd", "zero", "circle", "gone",
        "pipe", "sub", ".", "", "-", "~", "~root/x", "/etc/passwd", str(folder / "a b.png"), "../media-too/x.png",
        "%2e%2e/outside.png", "a\0.png", "x" * 5000, "file:///etc/passwd", f"file://{folder}/../outside.png",
        f"file://{folder}/%2e%2e/outside.png", f"file://{folder}/up/outside.png", "file://evil.example/a.png",
        "file:", "file:///", "file://", "file:///dev/zero", "file:///proc/self/environ", f"file://{folder}-too/x.png",
        "ftp://example.org/a.png", "gopher://x", "javascript:1", "C:\\a.png", "jar:http://x", "\\\\host\\share\\a.png",
        None, 7, b"bytes", ["a"], {"url": "x"},
    ]  # fmt: skip


def test_nothing_leads_out_of_the_media_path(escapes, folder, tmp_path):
    load = loader(MediaPolicy(media_path=folder))
    for source in escapes:
        with pytest.raises((ImageRefused, ImageNotFound, ImageUnreadable)) as caught:
            load(source)
        said = f"{caught.value} {caught.value.hint}".replace(str(source), "")
        assert str(tmp_path) not in said and "\n" not in said, source


def test_without_a_media_path_no_file_is_read(folder, escapes, monkeypatch):
    monkeypatch.chdir(folder)
    for source in ["a b.png", f"file://{folder}/a%20b.png", *escapes]:
        with pytest.raises(ImageError):
            loader(MediaPolicy())(source)


def test_whether_a_file_outside_exists_is_not_told(folder, tmp_path):
    load, said = loader(MediaPolicy(media_path=folder)), set()
    for name in ("../outside.png", "../nothing.png"):
        with pytest.raises(ImageRefused) as caught:
            load(name)
        said.add(str(caught.value).replace(name, ""))
    assert len(said) == 1


def test_a_file_that_becomes_a_link_after_its_check_is_not_read(folder, tmp_path, monkeypatch):
    def swap_and_open(path, flags):
        (folder / "a b.png").unlink()
        (folder / "a b.png").symlink_to(tmp_path / "outside.png")
        return opened(path, flags)

    opened = os.open
    monkeypatch.setattr(os, "open", swap_and_open)
    with pytest.raises(ImageRefused):
        loader(MediaPolicy(media_path=folder))("a b.png")


def test_a_file_is_read_up_to_the_limit_in_bytes(folder):
    assert same(loader(MediaPolicy(media_path=folder, max_bytes=len(PNG)))("a b.png"))
    with pytest.raises(ImageTooLarge):
        loader(MediaPolicy(media_path=folder, max_bytes=len(PNG) - 1))("a b.png")


def test_pixels_have_a_limit():
    with pytest.raises(ImageTooLarge, match="600"):
        loader(MediaPolicy(max_pixels=599))(URI)


def test_what_a_decoder_says_stays_here():
    damaged = "data:image/png;base64," + base64.b64encode(PNG[:-200]).decode()
    with pytest.raises(ImageDamaged) as inside, media.opened(damaged):
        pass
    with pytest.raises(ImageUnreadable) as caught:
        loader(MediaPolicy())(damaged)
    assert inside.value.reason not in str(caught.value)
    assert str(caught.value).endswith("it is damaged or cut short.") and caught.value.__suppress_context__


def test_a_long_address_is_shortened_where_it_is_told():
    with pytest.raises(ImageUnreadable) as caught:
        loader(MediaPolicy())("data:image/png;base64," + "A" * 10**6)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("start", ["http://u:p@site.example/", "http://[", "http://127.0.0.1:9/", "http://"])
def test_a_long_web_address_is_shortened_where_it_is_told(start):
    with pytest.raises(ImageFetchFailed) as caught:
        loader(MediaPolicy())(start + "a" * 100_000)
    assert len(str(caught.value)) < 1000


def test_a_picture_that_takes_long_does_not_hold_up_small_ones(monkeypatch):
    monkeypatch.setattr("pixtral_cli.server.media_policy.LARGE_PIXELS", 599)
    monkeypatch.setattr("pixtral_cli.server.media_policy.PIXELS_AT_ONCE", 600)
    load, slow, small = loader(MediaPolicy()), threading.Event(), encoded(Image.new("RGB", (4, 4)))
    work = media.to_rgb

    def slowly(image):
        if image.size == NOISE.size:
            slow.wait(20)
        return work(image)

    monkeypatch.setattr(media, "to_rgb", slowly)
    held = threading.Thread(target=load, args=(URI,))
    held.start()
    try:
        assert load("data:image/png;base64," + base64.b64encode(small).decode()).size == (4, 4)
        monkeypatch.setattr("pixtral_cli.server.media_policy.WAIT_SECONDS", 0.05)
        with pytest.raises(ImageRefused, match="too many"):
            load(URI)
    finally:
        slow.set()
        held.join()
    assert same(load(URI))


def test_a_picture_has_its_turn_until_it_is_let_go_of(monkeypatch):
    monkeypatch.setattr("pixtral_cli.server.media_policy.PIXELS_AT_ONCE", 1000)
    monkeypatch.setattr("pixtral_cli.server.media_policy.WAIT_SECONDS", 0.05)
    pictures = RequestImages(MediaPolicy())
    with pictures.opened(URI), pytest.raises(ImageRefused, match="too many"), pictures.opened(URI):
        pass
    with pictures.opened(URI) as picture:
        assert same(picture)


def test_what_goes_wrong_with_a_picture_ends_its_turn(monkeypatch):
    monkeypatch.setattr("pixtral_cli.server.media_policy.PIXELS_AT_ONCE", 1000)
    monkeypatch.setattr("pixtral_cli.server.media_policy.WAIT_SECONDS", 0.05)
    pictures = RequestImages(MediaPolicy())
    damaged = "data:image/png;base64," + base64.b64encode(PNG[:-200]).decode()
    for _ in range(3):
        with pytest.raises(ImageUnreadable), pictures.opened(damaged):
            pass
        with pytest.raises(MemoryError), pictures.opened(URI):
            raise MemoryError
    with pictures.opened(URI) as picture:
        assert same(picture)


def test_the_pictures_of_a_client_that_has_left_are_not_decoded(monkeypatch):
    pictures, begun, go_on, decoded = RequestImages(MediaPolicy()), threading.Event(), threading.Event(), []
    monkeypatch.setattr(media, "to_rgb", lambda image: decoded.append(image) or image)

    def three():
        for _ in range(3):
            with pictures.opened(URI):
                begun.set()
                go_on.wait(20)

    async def leave():
        threads = Threads(1, "pictures")
        asking = asyncio.create_task(threads.run(three))
        await asyncio.to_thread(begun.wait, 20)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        go_on.set()
        await threads.run(lambda: None)  # the one thread is free again

    asyncio.run(leave())
    assert len(decoded) == 1


def test_every_way_to_read_an_image_is_the_servers_own():
    ways = {name for name, member in vars(media.ImageReader).items() if callable(member) and not name.startswith("_")}
    assert ways - set(vars(RequestImages)) == {"opened", "checked"}


def fetching(look_up=socket.getaddrinfo, **policy):
    return loader(MediaPolicy(**{"private_networks": LOOPBACK, "look_up": look_up, **policy}))


def test_a_picture_on_the_web_is_fetched_politely():
    with web(PNG) as site:
        assert same(fetching(names(site_example="127.0.0.1"))(f"http://site.example:{site.server_port}/x.png"))
        assert site.seen == [("127.0.0.1", "/x.png", f"site.example:{site.server_port}")]
        assert "pixtral" in site.agents[0]["User-Agent"] and site.agents[0]["Accept-Encoding"] == "identity"


def test_the_proxies_of_the_environment_are_not_asked(monkeypatch):
    with web(PNG) as proxy, web(PNG) as site:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        assert same(fetching()(f"http://127.0.0.1:{site.server_port}/"))
        assert proxy.seen == [] and len(site.seen) == 1


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ({"headers": {"Content-Type": "IMAGE/webp"}}, True),
        ({"headers": {"Content-Type": "application/octet-stream"}}, True),
        ({"headers": {"Content-Type": None}}, True),
        ({"headers": {"Content-Type": "text/html"}}, False),
        ({"headers": {"Content-Type": "application/json"}}, False),
        ({"headers": {"Content-Type": "application/octet-stream"}, "body": b"<html>"}, False),
        ({"headers": {"Content-Encoding": "gzip"}}, False),
        ({"headers": {"Content-Length": "99999"}}, False),
        ({"status": 500}, False),
    ],
    ids=str,
)
def test_only_what_is_said_to_be_a_picture_is_taken(answer, taken):
    with web(PNG, x=answer) as site:
        if taken:
            assert same(fetching()(f"http://127.0.0.1:{site.server_port}/x"))
        else:
            with pytest.raises(ImageFetchFailed):
                fetching()(f"http://127.0.0.1:{site.server_port}/x")


def test_a_download_ends_at_the_limit_in_bytes_whatever_was_promised():
    endless = {"pieces": [PNG] * 500, "headers": {"Content-Length": None}}
    with web(PNG, x=endless) as site, pytest.raises(ImageTooLarge):
        fetching(max_bytes=10_000)(f"http://127.0.0.1:{site.server_port}/x")


@pytest.mark.parametrize(
    ("domains", "host", "reached"),
    [
        (("site.example",), "site.example", True),
        (("site.example",), "SITE.example.", True),
        (("Site.Example",), "site.example", True),
        (("site.example",), "www.site.example", False),
        (("site.example",), "notsite.example", False),
        (("*.site.example",), "www.site.example", True),
        ((".site.example",), "a.b.site.example", True),
        (("*.site.example",), "site.example", False),
        (("*.site.example",), "evilsite.example", False),
        (("other.example", "site.example"), "site.example", True),
        (("other.example",), "127.0.0.1", False),
    ],
)
def test_allowed_domains_are_the_only_ones(domains, host, reached):
    hosts = "site.example SITE.example. www.site.example notsite.example a.b.site.example evilsite.example".split()
    with web(PNG) as site:
        look_up = names(**{name.replace(".", "_"): "127.0.0.1" for name in hosts})
        load = fetching(look_up, allowed_domains=domains)
        if reached:
            assert same(load(f"http://{host}:{site.server_port}/x"))
        else:
            with pytest.raises(ImageFetchFailed, match="not allowed"):
                load(f"http://{host}:{site.server_port}/x")
            assert look_up.asked == [] and site.seen == []


@pytest.mark.parametrize("error", [ImageNotFound("a.png"), ImageFetchFailed("http://a/b.png", "it is gone")])
def test_who_asks_over_http_is_told_what_can_be_done_over_http(error):
    told = refusal_of(error)
    assert told.status == 400 and "data: URI" in told.message and "path" not in told.message
