"""Addresses to listen on: whether they are free and can be reached from other hosts."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence


class AddressError(RuntimeError):
    """An address cannot be listened on; the message names it and says what to do."""


def check(host: str, wanted: Mapping[str, Sequence[int]]) -> None:
    """Check that these ports of `host` can be listened on, before anything is loaded.

    Parameters
    ----------
    host
        Name or address.
    wanted
        The ports by the flag that gives them; 0, any free port, is not checked.

    Raises
    ------
    AddressError
        One is taken or given twice, or `host` is no address of this machine.
    """
    flags: dict[int, str] = {}
    for flag, port in ((flag, port) for flag, ports in wanted.items() for port in ports if port):
        if (other := flags.setdefault(port, flag)) != flag:
            raise AddressError(f"{other} and {flag} both want port {port}: give each its own")
        with reserved(host, port, flag) as holder, _explained(host, port, flag):
            holder.listen()  # a port that another process listens on may still be bound, but not listened on


@contextlib.contextmanager
def reserved(host: str, port: int, flag: str = "--port") -> Iterator[socket.socket]:
    """Reserve a port that will be listened on later; AddressError where that fails."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _explained(host, port, flag):
            holder.bind((host, port))
        yield holder


def on_loopback(host: str) -> bool:
    """Whether no other host can reach an address; OSError where it is none."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def with_port(host: str, port: int) -> str:
    """Return an address as in URLs, with brackets around an IPv6 address."""
    return f"{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def _explained(host: str, port: int, flag: str) -> Iterator[None]:
    try:
        yield
    except OverflowError:
        raise AddressError(f"{flag} {port} is no port: give one from 1 to 65535") from None
    except UnicodeError:
        raise AddressError(f"--host {host} is no name of a host: give an address of this machine") from None
    except OSError as error:
        raise AddressError(_reason(host, port, flag, error)) from None


def _reason(host: str, port: int, flag: str, error: OSError) -> str:
    match error:
        case OSError(errno=errno.EADDRINUSE):
            return f"{with_port(host, port)} is in use: stop the process that listens there, or choose another {flag}"
        case OSError(errno=errno.EACCES):
            return f"no permission to listen on {with_port(host, port)}: choose a {flag} from 1024 up"
        case _:
            # Also where the name is unknown (socket.gaierror).
            return (
                f"cannot listen on {with_port(host, port)} ({error.strerror}): give --host an address of this machine"
            )
