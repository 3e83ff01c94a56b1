"""What is written in one round of the event loop reaches each client whole and in order."""

import asyncio

from ares.gateway.http.round_of_writes import RoundOfWrites
from tests.transports import Nowhere


class Client(Nowhere):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closed


async def test_parts_are_written_together_at_the_end_of_the_round() -> None:
    writes, a, b = RoundOfWrites(), Client(), Client()
    for data in (b"1", b"2", b"3"):
        writes.add(a, data)
        writes.add(b, data * 2)
    assert not a.sent + b.sent
    await asyncio.sleep(0)
    assert (a.sent, b.sent) == ([b"123"], [b"112233"])
    writes.add(a, b"4")
    await asyncio.sleep(0)
    assert a.sent == [b"123", b"4"]


async def test_what_is_flushed_comes_before_what_is_added_later() -> None:
    writes, a, b = RoundOfWrites(), Client(), Client()
    writes.add(a, b"1")
    writes.add(b, b"x")
    writes.flush(a)
    assert (a.sent, b.sent) == ([b"1"], [])
    writes.add(a, b"2")
    writes.flush(b)
    writes.flush(b)
    await asyncio.sleep(0)
    assert (a.sent, b.sent) == ([b"1", b"2"], [b"x"])


async def test_a_client_that_has_left_costs_the_others_nothing() -> None:
    writes, left, stays = RoundOfWrites(), Client(), Client()
    for client in (left, stays):
        writes.add(client, b"1")
    left.closed = True
    await asyncio.sleep(0)
    writes.add(left, b"2")
    writes.flush(left)
    assert (left.sent, stays.sent) == ([], [b"1"])
