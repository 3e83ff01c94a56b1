"""Whether the address that an instance publishes leads the gateway, and other instances, to that instance."""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from ares.protocol import messages

_START = "start it with --host and --advertise-host of an address that they reach (docs/operations.md)"


def wildcard(found: messages.Description) -> str | None:
    """Say what is wrong where the published address stands for every one, as in an earlier version; or return None."""
    host = _host(found)
    address = _literal(host)
    if address is None or not address.is_unspecified:
        return None
    return f"it publishes {host}, by which others connect to themselves; {_START}"


async def on_another_host(found: messages.Description, url: str) -> str | None:
    """Say what is wrong where an instance on another host publishes loopback; or return None."""
    host = urlsplit(url).hostname or ""
    if not on_loopback(found) or is_loopback(host):
        return None
    try:
        known = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None  # it was known a moment ago
    if all(is_loopback(str(address[0])) for *_, address in known):
        return None
    return f"it publishes {_host(found)}, by which others connect to themselves; {_START}"


def among_other_hosts(found: messages.Description, others: Iterable[messages.Description]) -> str | None:
    """Say what is wrong where an instance on loopback is one of a pool with instances on others; or return None."""
    if not on_loopback(found):
        return None
    other = next((other for other in others if not on_loopback(other)), None)
    if other is None:
        return None
    return (
        f"it publishes {_host(found)}, by which {other.name} at {_host(other)} would connect to itself; {_START}, or "
        "all of them on loopback"
    )


def on_loopback(found: messages.Description) -> bool:
    """Whether only its own host can connect to the published address."""
    return is_loopback(_host(found))


def is_loopback(host: str) -> bool:
    """Whether this is an address of loopback, or its usual name; no other name is resolved."""
    address = _literal(host)
    return host == "localhost" if address is None else address.is_loopback


def _host(found: messages.Description) -> str:
    return urlsplit(found.control_address).hostname or ""


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
