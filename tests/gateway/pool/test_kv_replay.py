"""What instances have kept comes in parts, from one instance at a time; what is not answered is asked for again."""

import asyncio

import pytest

from ares.gateway.pool import kv_replay
from ares.gateway.pool.kv_replay import KvReplay
from ares.protocol import messages, rpc
from tests.waiting import eventually


class Sent(list[int]):
    """What was asked for."""

    async def send(self, body: bytes) -> None:
        command = rpc.decode_command(body)
        assert isinstance(command, messages.FollowKvEvents)
        assert command.paced
        self.append(command.since)


async def test_one_instance_at_a_time_and_with_pauses() -> None:
    turn, first, second = asyncio.Lock(), Sent(), Sent()
    one, other = KvReplay(turn, first.send), KvReplay(turn, second.send)
    one.ask(0)
    other.ask(7)
    await eventually(lambda: first == [0])
    await asyncio.sleep(0.01)
    assert not second
    one.ask(3)  # as when a part came
    begun = asyncio.get_running_loop().time()
    one.taken(0.02)
    await eventually(lambda: second == [7])
    assert asyncio.get_running_loop().time() - begun >= 0.079
    other.taken(0.0)
    await eventually(lambda: first == [0, 3])
    one.taken(0.0)
    await asyncio.sleep(0.02)
    assert (first, second) == ([0, 3], [7])


async def test_what_is_not_answered_is_asked_for_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_replay, "ANSWER_S", 0.02)
    turn, first, second = asyncio.Lock(), Sent(), Sent()
    silent, other = KvReplay(turn, first.send), KvReplay(turn, second.send)
    silent.ask(5)
    other.ask(0)
    await eventually(lambda: len(first) == 3)
    await asyncio.sleep(0.1)
    assert first == [5, 5, 5]
    assert second, "the others have their turn meanwhile"


async def test_an_instance_that_is_given_up_is_not_asked() -> None:
    turn, sent, others = asyncio.Lock(), Sent(), Sent()
    lost, other = KvReplay(turn, sent.send), KvReplay(turn, others.send)
    lost.ask(0)
    other.ask(0)
    await eventually(lambda: sent == [0])
    lost.stop()
    await eventually(lambda: others == [0])
    lost.ask(9)
    other.taken(0.0)
    await eventually(lambda: sent == [0, 9])
    lost.stop()
    other.stop()
    await asyncio.sleep(0.02)
    assert (sent, others) == ([0, 9], [0])
    assert not turn.locked()
