"""Loads of instances: exact when they are read, and cheap at every arrival between two reads."""

import time
from types import SimpleNamespace
from typing import Any

from ares.gateway.control.instance_loads import InstanceLoads
from ares.protocol import messages
from tests.gateway.control.test_snapshot import instance


def sessions(where: Any, count: int, tokens: int = 200) -> Any:
    return [SimpleNamespace(instance=where, destination=None, tokens=tokens) for _ in range(count)]


def test_what_was_sent_since_the_last_read_counts() -> None:
    one, two = instance("one", []), instance("two", [])
    loads = InstanceLoads()
    many = sessions(one, 20_000)
    assert loads.read([one, two], many, 128) == [20_000 * 256, 0]
    loads.add(two, 300)
    # Not read again: the next 20 times as long as reading took.
    assert loads.read([one, two], [], 128) == [20_000 * 256, 384]


def test_they_are_read_again_after_a_while_and_for_other_instances() -> None:
    one, two = instance("one", []), instance("two", [messages.Row("other/1", 500, 5, "running")])
    loads = InstanceLoads()
    assert loads.read([one], sessions(one, 20_000), 128) == [20_000 * 256]
    assert loads.read([one, two], sessions(one, 1), 128) == [256, 512]
    deadline = time.monotonic() + 10
    while loads.read([one, two], sessions(two, 3), 128) != [0, 768]:
        assert time.monotonic() < deadline
    assert loads.read([one, two], sessions(two, 3), 64) == [0, 768]


def test_an_arrival_among_many_sessions_costs_little() -> None:
    """The start of a thousand streams must not take the square of a thousand."""

    def arrive(count: int) -> float:
        """Let so many arrive; return the CPU seconds."""
        begun = time.process_time()
        for n in range(count):
            loads.read(where, running, 128)
            loads.add(where[n % 4], 200)
            running.extend(sessions(where[n % 4], 1))
        return time.process_time() - begun

    where = [instance(str(n), []) for n in range(4)]
    loads, running = InstanceLoads(), []
    first = arrive(1000)
    # Where each arrival takes as long as there are sessions, the second half takes three times as long as the first.
    assert arrive(1000) < 2 * first + 0.02
    assert loads.read(where, running, 64) == [500 * 256] * 4
