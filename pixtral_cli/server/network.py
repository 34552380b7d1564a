"""The name of a host in, a socket to one checked address out: what keeps a server's own network out of reach.

A name is looked up once. Every address that it has is checked, and the connection goes to one of those addresses, so
that a second answer of the name's owner changes nothing. Addresses, not spellings, are judged: 0x7f.1 and 2130706433
are whatever the look-up makes of them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
LookUp = Callable[..., list[tuple]]
"""`socket.getaddrinfo`, or what stands for it in a test."""

NEVER = tuple(
    map(
        ip_network,
        (
            "169.254.0.0/16",  # link-local: the metadata services of AWS, Azure, Google, Oracle, Tencent and others
            "fe80::/10",
            "fd00:ec2::/32",  # AWS
            "fd20:ce::/32",  # Google
            "fd00:42::/32",  # Scaleway
            "168.63.129.16/32",  # Azure's host
            "100.100.100.200/32",  # Alibaba
            "192.0.0.192/32",  # Oracle
            "0.0.0.0/8",
            "::/128",
        ),
    )
)
"""Not reachable whatever is allowed: services that give a machine's keys to whoever asks from it."""
NOT_PUBLIC = tuple(map(ip_network, ("100.64.0.0/10", "192.88.99.0/24", "2002::/16", "3fff::/20")))
"""Carriers' shared addresses, 6to4 relays, 6to4, documentation: what `is_private` leaves out."""
PUBLIC_IPV6 = ip_network("2000::/3")
NAT64 = ip_network("64:ff9b::/96")
LOW_BITS = (NAT64, *map(ip_network, ("64:ff9b:1::/48", "::ffff:0:0/96")))
"""IPv6 whose last 32 bits are an IPv4 address: NAT64 in both its ranges, and mapped."""
LOW_PORTS = (80, 443)
HIGH_PORT = 1024


class ConnectionRefusedByPolicy(OSError):
    """The policy does not let this host be reached; the text is the reason."""


@dataclass(frozen=True)
class NetworkPolicy:
    """Which hosts may be reached."""

    domains: tuple[str, ...] = ()
    """If any: the only host names, each exact, or "*.example.org" (".example.org") for all names below it."""
    private_networks: tuple[Network, ...] = ()
    """Reachable beside the public addresses."""
    look_up: LookUp = socket.getaddrinfo

    def dial(self, host: str, port: int, seconds: float) -> socket.socket:
        """A connection to `host`, within `seconds` for all of its addresses together.

        Raises:
            ConnectionRefusedByPolicy: its name, its port or one of its addresses is not allowed.
            OSError: unknown, or out of reach.
        """
        self._check_name(host)
        found = self.look_up(host, port, type=socket.SOCK_STREAM)
        for *_, target in found:
            self._check_address(ip_address(target[0]), port)
        return _first_to_answer(found, time.monotonic() + seconds)

    def _check_name(self, host: str) -> None:
        name = host.lower().rstrip(".")
        if self.domains and not any(_matches(name, rule.lower()) for rule in self.domains):
            raise ConnectionRefusedByPolicy("pictures from this host are not allowed on this server")

    def _check_address(self, address: Address, port: int) -> None:
        inner = _ipv4_in(address)
        if _within(address, NEVER) or (inner and _within(inner, NEVER)):
            raise ConnectionRefusedByPolicy("its address is never allowed")
        if _within(address, self.private_networks):
            return
        if not is_public(address):
            raise ConnectionRefusedByPolicy("its address is not a public one")
        if port < HIGH_PORT and port not in LOW_PORTS:
            raise ConnectionRefusedByPolicy(f"port {port} is not one for pictures")


def is_public(address: Address) -> bool:
    """Whether anybody on the internet could reach `address`.

    Of IPv6 only global unicast counts, and IPv4 through NAT64 if that is public; the other ways to write IPv4 in IPv6
    (mapped, compatible, 6to4, Teredo) are nobody's real address.
    """
    if address in NAT64:
        return is_public(_ipv4_in(address))
    if isinstance(address, IPv6Address) and address not in PUBLIC_IPV6:
        return False
    special = address.is_private or address.is_multicast or address.is_reserved or address.is_unspecified
    return not (special or _within(address, NOT_PUBLIC) or _within(address, NEVER))


def _ipv4_in(address: Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, however it is packed."""
    if isinstance(address, IPv4Address):
        return None
    low = IPv4Address(int(address) & 0xFFFFFFFF)
    if any(address in network for network in LOW_BITS):
        return low
    return address.sixtofour or (address.teredo[1] if address.teredo else None)


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _matches(name: str, rule: str) -> bool:
    below = rule.removeprefix("*")
    return name.endswith(below) if below.startswith(".") else name == rule.rstrip(".")


def _first_to_answer(found: list[tuple], deadline: float) -> socket.socket:
    last: OSError = OSError("its name has no address")
    for family, kind, protocol, _, target in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(target)
            return connection
        except OSError as error:
            connection.close()
            last = error
    raise last
