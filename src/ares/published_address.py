"""The address that an instance publishes, for gateways and other instances to connect to."""

import ipaddress
import os
import socket
from collections.abc import Iterator

from ares.addresses import AddressError, on_loopback

# vLLM's own variable for the same address (utils/network_utils.py:get_ip, 0.32).
_VARIABLE = "VLLM_HOST_IP"
_FLAG = "--advertise-host"
_GIVE = "give the address of this machine that they reach, such as 10.0.0.1"
# Addresses outside of every private network: the route to them is the one by the default gateway. Nothing is sent.
_FAR = {socket.AF_INET: "8.8.8.8", socket.AF_INET6: "2001:4860:4860::8888"}


def is_wildcard(host: str) -> bool:
    """Whether a host to listen on is every address of this machine: 0.0.0.0 or ::."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def here(host: str) -> str:
    """Return the address at which this machine itself reaches what listens on `host`."""
    if not is_wildcard(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def published(host: str, advertise_host: str | None = None) -> str:
    """Return the address to publish for what listens on `host`.

    Parameters
    ----------
    host
        Name or address that is listened on.
    advertise_host
        What the user gave. By default that is `host`; where `host` is a wildcard, VLLM_HOST_IP, the source address of
        the route to the default gateway, or what the name of this machine resolves to, whichever is known first.

    Raises
    ------
    AddressError
        Others cannot connect to it.
    """
    if advertise_host:
        _check(_FLAG, advertise_host, host)
        return advertise_host
    if not is_wildcard(host):
        _check("--host", host, host)
        return host
    if variable := os.environ.get(_VARIABLE):
        _check(_VARIABLE, variable, host)
        return variable
    families = [socket.AF_INET6, socket.AF_INET] if ":" in host else [socket.AF_INET]
    found = next((address for address in _candidates(families) if _why_not(address) is None), None)
    if found is None or on_loopback(found):
        raise AddressError(
            f"--host {host} listens on every address, and which of them other hosts reach is not known here (no "
            f"default route, and the name of this machine is loopback): give it with {_FLAG}"
        )
    return found


def _candidates(families: list[socket.AddressFamily]) -> Iterator[str]:
    for family in families:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((_FAR[family], 80))
                yield str(probe.getsockname()[0])
        except OSError:
            continue
    for family in families:
        try:
            found = socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM)
        except OSError:
            continue
        yield from (str(to[0]) for *_, to in found if not ipaddress.ip_address(to[0]).is_loopback)


def _check(given_by: str, address: str, host: str) -> None:
    """Raise AddressError where others cannot connect to `address`, or it does not lead to what listens on `host`."""
    if (reason := _why_not(address)) is not None:
        raise AddressError(f"{given_by} {address} {reason}")
    if on_loopback(address) and not on_loopback(host):
        raise AddressError(
            f"{given_by} {address} is loopback and leads other hosts to themselves, while --host {host} listens to "
            f"them: {_GIVE}, or --host {address}"
        )
    if on_loopback(host) and not on_loopback(address):
        raise AddressError(
            f"{given_by} {address} cannot be reached, since --host {host} listens on loopback only: give --host "
            f"{address}, or 0.0.0.0"
        )


def _why_not(address: str) -> str | None:
    """Return why no other host can connect to an address; None where one can."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return f"is no address, and no name that this machine can resolve: {_GIVE}"
    for one in (ipaddress.ip_address(text) for text in found):
        if one.is_unspecified:
            return f"stands for every address, and none that others can connect to: {_GIVE}"
        if one.is_multicast:
            return f"is the address of a group, not of a machine: {_GIVE}"
        if one.version == 6 and one.is_link_local:
            return f"holds on one link only, and under another name on each host: {_GIVE}"
    return None
