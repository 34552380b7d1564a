"""A picture's address cannot make the server talk to what its owner did not mean: by no name, spelling or detour.

The forbidden side is real: it listens on 127.0.0.2, while 127.0.0.1 stands for the web that may be reached.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from ipaddress import ip_address, ip_network

import pytest
from PIL import Image
from support.processes import PATIENCE, wait_until
from support.web_server import names, web

from pixtral_cli.prompt.errors import ImageFetchFailed
from pixtral_cli.server.media_policy import MediaPolicy, RequestImages, is_public

ALLOWED = (ip_network("127.0.0.1/32"),)
BMP = b"BM:\0\0\0\0\0\0\0006\0\0\0(\0\0\0\1\0\0\0\1\0\0\0\1\0\x18\0\0\0\0\0\4\0\0\0" + bytes(20)


@pytest.fixture(autouse=True)
def pils_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture
def site():
    with web(BMP) as site:
        yield site


@pytest.fixture
def secret(site):
    """What must never be asked: another address with the same port."""
    with web(BMP, "127.0.0.2", site.server_port) as secret:
        yield secret
        assert secret.seen == []


def load(url, look_up=socket.getaddrinfo, **policy):
    policy = MediaPolicy(**{"private_networks": ALLOWED, "look_up": look_up, **policy})
    with RequestImages(policy).opened(url) as picture:
        return picture


def refused(url, look_up=socket.getaddrinfo, match=None, **policy):
    with pytest.raises(ImageFetchFailed, match=match) as caught:
        load(url, look_up, **policy)
    return str(caught.value)


def test_the_allowed_side_can_be_reached(site):
    assert load(f"http://127.0.0.1:{site.server_port}/x").size == (1, 1) and len(site.seen) == 1


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1",
        "127.000.000.001", "localhost", "LOCALHOST", "localhost.", "127.0.0.1.", "0.0.0.0", "0", "[::1]", "[::]",
        "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
        "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[::ffff:169.254.169.254]", "[fe80::1%25lo]", "①②⑦.⓪.⓪.①",
        "127。0。0。1", "%31%32%37.0.0.1", "127.0.0.1%00.example.org", "127.0.0.1%2f@example.org",
        "example.org@127.0.0.1", "example.org\\@127.0.0.1", "127.0.0.1#@example.org", "127.0.0.1?@example.org",
        "10.0.0.1", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "[fc00::1]", "[fd00:ec2::254]",
    ],
)  # fmt: skip
def test_no_spelling_reaches_this_machine_or_its_network(site, host):
    start = time.monotonic()
    refused(f"http://{host}:{site.server_port}/x", private_networks=(), connect_seconds=3, total_seconds=4)
    assert site.seen == [] and time.monotonic() - start < 4, "refused before anything was dialled"


@pytest.mark.parametrize(
    "address",
    """0.0.0.0 10.1.2.3 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.255 169.254.0.1 169.254.169.254 172.31.0.1
    192.0.0.1 192.0.2.1 192.168.1.1 192.88.99.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.0.0.1 240.0.0.1
    255.255.255.255 168.63.129.16 100.100.100.200 192.0.0.192 :: ::1 ::ffff:8.8.8.8 ::8.8.8.8 64:ff9b::10.0.0.1
    64:ff9b::169.254.169.254 64:ff9b:1::8.8.8.8 100::1 2001::1 2001:db8::1 2002:808:808:: 3fff::1 fc00::1
    fd00:ec2::254 fd20:ce::254 fe80::1 fec0::1 ff02::1 4000::1""".split(),
)
def test_these_addresses_are_not_public(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", "8.8.8.8 1.1.1.1 100.63.0.1 172.32.0.1 2606:4700::1111 64:ff9b::8.8.8.8".split())
def test_these_addresses_are_public(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    """169.254.169.254 169.254.170.2 fd00:ec2::254 fd20:ce::254 fd00:42::42 168.63.129.16 100.100.100.200 192.0.0.192
    fe80::1 0.0.0.0 :: ::ffff:169.254.169.254 64:ff9b::a9fe:a9fe 2002:a9fe:a9fe::1""".split(),
)
def test_services_that_give_away_a_machines_keys_stay_out_of_reach_however_much_is_allowed(address):
    everything = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    look_up = names(cloud_example=address)
    with pytest.raises(OSError, match="never allowed"):
        MediaPolicy(private_networks=everything, look_up=look_up).dial("cloud.example", 80, 1)


@pytest.mark.parametrize("port", [1, 22, 25, 443 - 1, 1023])
def test_public_hosts_are_asked_on_ports_for_the_web_only(port):
    with pytest.raises(OSError, match="not one for pictures"):
        MediaPolicy(look_up=names(site_example="8.8.8.8")).dial("site.example", port, 1)


def test_a_name_with_one_forbidden_address_among_good_ones_is_refused(site, secret):
    def look_up(host, port, **options):
        return [*socket.getaddrinfo("127.0.0.1", port, **options), *socket.getaddrinfo("127.0.0.2", port, **options)]

    refused(f"http://site.example:{site.server_port}/x", look_up, "not a public")
    assert site.seen == []


def test_a_name_is_looked_up_once_and_a_changed_answer_changes_nothing(site, secret):
    look_up = names(site_example=iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"]))
    assert load(f"http://site.example:{site.server_port}/x", look_up).size == (1, 1)
    assert look_up.asked == ["site.example"]
    assert site.seen == [("127.0.0.1", "/x", f"site.example:{site.server_port}")]


def test_a_second_answer_is_checked_as_the_first_was(site, secret):
    look_up = names(site_example=iter(["127.0.0.1", "127.0.0.2"]))
    site.answers["/x"] = {"status": 302, "headers": {"Location": f"http://site.example:{site.server_port}/y"}}
    refused(f"http://site.example:{site.server_port}/x", look_up, "not a public")
    assert look_up.asked == ["site.example"] * 2 and len(site.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:{port}/x", "http://secret.example:{port}/x", "//127.0.0.2:{port}/x", "http://0x7f.2:{port}/",
        "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "ftp://127.0.0.2/x", "gopher://127.0.0.2/",
        "data:image/bmp;base64,Qk0=", "http://a:b@127.0.0.2:{port}/x", "http://[::ffff:127.0.0.2]:{port}/x",
    ],
)  # fmt: skip
def test_no_redirection_leads_to_the_forbidden_side(site, secret, status, target):
    target = target.format(port=site.server_port)
    site.answers["/x"] = {"status": status, "headers": {"Location": target}}
    refused(f"http://127.0.0.1:{site.server_port}/x", names(secret_example="127.0.0.2"))
    assert len(site.seen) == 1


def test_a_redirection_out_of_the_allowed_domains_is_refused(site):
    site.answers["/x"] = {"status": 302, "headers": {"Location": f"http://other.example:{site.server_port}/y"}}
    look_up = names(site_example="127.0.0.1", other_example="127.0.0.1")
    refused(f"http://site.example:{site.server_port}/x", look_up, "not allowed", allowed_domains=("site.example",))
    assert look_up.asked == ["site.example"]


@pytest.mark.parametrize(("steps", "arrives"), [(3, True), (4, False)])
def test_three_redirections_are_followed_and_no_fourth(site, steps, arrives):
    for step in range(steps):
        site.answers[f"/{step}"] = {"status": 302, "headers": {"Location": f"/{step + 1}"}}
    if arrives:
        assert load(f"http://127.0.0.1:{site.server_port}/0").size == (1, 1)
    else:
        refused(f"http://127.0.0.1:{site.server_port}/0")
    assert len(site.seen) == 4


def test_a_redirection_with_an_endless_body_is_not_read(site):
    step = {"Location": "/picture", "Content-Length": str(10**12)}
    site.answers["/x"] = {"status": 302, "headers": step, "pieces": (bytes(2**20) for _ in range(10**6))}
    start = time.monotonic()
    assert load(f"http://127.0.0.1:{site.server_port}/x").size == (1, 1)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("endless", ["body", "head", "handshake"])
def test_a_server_that_sends_a_byte_now_and_then_is_left_in_time_and_holds_no_thread(endless):
    start = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
    start = {"body": start + b"\r\n\x89PNG", "head": start + b"X: ", "handshake": b"\x16\x03\x03\x40\0"}[endless]
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def drip():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(start)
                try:
                    while True:
                        time.sleep(0.05)
                        connection.sendall(b"x")
                except OSError:
                    pass

        dripping = threading.Thread(target=drip, daemon=True)
        dripping.start()
        scheme = "https" if endless == "handshake" else "http"
        refused(f"{scheme}://127.0.0.1:{port}/x", match="more than 0.5 seconds", total_seconds=0.5)
        dripping.join(PATIENCE)
    wait_until(lambda: not set(threading.enumerate()) - before)  # the download's thread ends


def test_a_name_that_takes_for_ever_to_look_up_is_left_in_time():
    look_up = names()
    release = threading.Event()
    refused("http://site.example/x", lambda *a, **k: release.wait(20) and look_up(*a, **k), "0.3", total_seconds=0.3)
    release.set()


def test_a_failed_look_up_or_connection_names_no_address_of_the_network():
    said = refused("http://inside.example:1/x", names(inside_example="10.9.8.7"))
    assert "10.9.8.7" not in said


@pytest.mark.parametrize(
    ("greeting", "told"),
    [
        (b"SSH-2.0-secret\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 500 secret\r\n\r\n", "answered 500"),
        (b"HTTP/1.1 302 secret\r\nLocation: file:///secret\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 secret\r\n\r\n", "does not speak HTTP"),
    ],
)
def test_what_another_server_says_is_not_told(greeting, told):
    def greet(listener):
        with listener.accept()[0] as client:
            client.recv(4096)
            client.sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=greet, args=(listener,), daemon=True).start()
        said = refused(f"http://127.0.0.1:{listener.getsockname()[1]}/x", match=told)
    assert "secret" not in said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=DNS:site.example"
    files = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return folder


@pytest.fixture
def secure(certificate, monkeypatch):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    with web(BMP, tls=tls) as site:
        yield site


def test_over_https_the_certificate_must_be_the_names_although_an_address_is_dialled(secure):
    look_up = names(site_example="127.0.0.1", other_example="127.0.0.1")
    assert load(f"https://site.example:{secure.server_port}/x", look_up).size == (1, 1)
    refused(f"https://other.example:{secure.server_port}/x", look_up, "(?i)certificate")
    refused(f"https://127.0.0.1:{secure.server_port}/x", look_up, "(?i)certificate")
    assert [host for _, _, host in secure.seen] == [f"site.example:{secure.server_port}"]


def test_an_unknown_certificate_is_refused(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    refused(f"https://site.example:{secure.server_port}/x", names(site_example="127.0.0.1"), "(?i)certificate")


def test_from_https_there_is_no_way_to_http(secure, site):
    secure.answers["/x"] = {"status": 302, "headers": {"Location": f"http://site.example:{site.server_port}/y"}}
    look_up = names(site_example="127.0.0.1")
    refused(f"https://site.example:{secure.server_port}/x", look_up, "from https to http")
    assert site.seen == []
