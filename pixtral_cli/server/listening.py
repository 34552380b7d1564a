"""An address in, a socket bound to it out, or a sentence why not; imports next to nothing, so it is known at once."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from pixtral_cli.errors import PixtralError

BACKLOG = 1024


def check_binding(host: str, keys: Sequence[str], insecure: bool) -> None:
    """Raise PixtralError for a key that guards nothing, and for an open address that nothing guards."""
    if any(not key.strip() or not key.isascii() or not key.isprintable() for key in keys):
        raise PixtralError(
            "An API key is empty, or has characters that no HTTP header can carry.",
            hint="Give --api-key (or PIXTRAL_API_KEY) printable ASCII; leave it out for none.",
        )
    if not (keys or insecure or is_loopback(host)):
        raise PixtralError(
            f"Everybody who reaches {host} could use this server: there is no API key.",
            hint="Set PIXTRAL_API_KEY or --api-key, bind --host 127.0.0.1, or say --insecure to mean it.",
        )


def is_loopback(host: str) -> bool:
    """Whether every address of `host` stays on this machine."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; with port 0, on a free one. Raises PixtralError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise PixtralError(
            f"There is no address {host!r} to serve at.",
            hint="Give --host an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them.",
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PixtralError(*_refusal(error, host, port)) from error
    return listener


def url(host: str, listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _refusal(error: OSError, host: str, port: int) -> tuple[str, str]:
    """The sentence and the next step."""
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use.", "Stop what uses it, or give another --port; 0 takes a free one."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Port {port} needs rights that you do not have.", "Give a --port of 1024 or above."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine.", "Give --host 127.0.0.1, or 0.0.0.0 for all addresses."
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"Cannot serve at {host}, port {port}: {reason}.", "Give another --host or --port."
