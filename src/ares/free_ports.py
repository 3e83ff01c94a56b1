"""TCP ports of this machine that nothing listens on."""

import contextlib
import random
import socket
from collections.abc import Container

# Below the range from which the kernel gives ports to outgoing connections, which could take a port before it is used.
candidates = range(20000, 32768)
given: set[int] = set()


def free_port(host: str, exclude: Container[int] = ()) -> int:
    """Return a TCP port of `host` that no process listens on; OSError where there is none.

    A process is given another port each time, until it has been given all: what is to listen on the earlier ones may
    not have started yet.
    """
    return free_ports(host, 1, exclude)


def free_ports(host: str, count: int, exclude: Container[int] = ()) -> int:
    """Return the first of this many consecutive ports as `free_port` returns them; OSError where there are none."""
    for avoided in (given, ()):
        for first in random.sample(candidates, len(candidates)):
            ports = range(first, first + count)
            if ports[-1] not in candidates or any(port in exclude or port in avoided for port in ports):
                continue
            if all(_is_free(host, port) for port in ports):
                given.update(ports)
                return first
    raise OSError(f"no {count} free ports in a row on {host}" if count > 1 else f"no free port on {host}")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family) as probe:
        probe.bind((host, port))
        return True
    return False
