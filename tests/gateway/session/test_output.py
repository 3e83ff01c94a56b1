"""Tokens of a stream go to the client once and in order, whether it keeps up or not."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from ares.gateway.pool.delta import Delta
from ares.gateway.pool.merged_tokens import MergedTokens
from ares.gateway.pool.stream import Stream
from ares.gateway.session.output import Output, Relay, TokenEmitter
from tests.gateway.pool.test_stream import event, feed, opened


class Client:
    """Takes tokens, at once or, while `behind`, only after `catch_up`."""

    def __init__(self, stop_at: int = 1 << 30) -> None:
        self.tokens: list[int] = []
        self.behind = False
        self._stop_at = stop_at
        self._caught_up = asyncio.Event()

    def emit(self, batch: list[Delta]) -> bool | Coroutine[Any, Any, bool]:
        return self._later(batch) if self.behind else self._now(batch)

    def catch_up(self) -> None:
        self.behind = False
        self._caught_up.set()

    def _now(self, batch: list[Delta]) -> bool:
        self.tokens += [token for delta in batch for token in delta.token_ids or []]
        return self.tokens[-1] >= self._stop_at

    async def _later(self, batch: list[Delta]) -> bool:
        await self._caught_up.wait()
        return self._now(batch)


class EagerClient(Client, TokenEmitter):
    """Takes tokens alone, too, while it is not behind; `alone` are those."""

    def __init__(self) -> None:
        super().__init__()
        self.alone: list[int] = []

    def __call__(self, batch: list[Delta]) -> bool | Coroutine[Any, Any, bool]:
        return self.emit(batch)

    def take_token(self, token_id: int) -> bool:
        if self.behind:
            return False
        self.alone.append(token_id)
        self.tokens.append(token_id)
        return True


class Relayed:
    """A relay whose first token has come, and the task that waits for what follows."""

    def __init__(self, client: Client) -> None:
        self.stream: Stream = opened(event(1))
        self.output = Output()
        self.relay = Relay(self.stream, self.output, client.emit)
        self._client = client
        self.task: asyncio.Task[list[Delta]]

    async def begin(self) -> None:
        first = await self.relay.next()
        assert first == [Delta(token_ids=[1])]
        await self.output.deliver(first, self._client.emit)
        self.task = asyncio.create_task(self.relay.next())
        await asyncio.sleep(0)


@pytest.fixture
async def client() -> Client:
    return Client(stop_at=9)


@pytest.fixture
async def relayed(client: Client) -> AsyncIterator[Relayed]:
    made = Relayed(client)
    await made.begin()
    yield made
    made.task.cancel()


async def test_tokens_need_no_task_while_the_client_keeps_up(client: Client, relayed: Relayed) -> None:
    for token in (2, 3):
        feed(relayed.stream, event(token))
        assert client.tokens[-1] == relayed.output.tokens[-1] == token


async def test_a_client_that_falls_behind_gets_the_rest_in_order(client: Client, relayed: Relayed) -> None:
    client.behind = True
    for token in (2, 3, 4):
        feed(relayed.stream, event(token))
    await asyncio.sleep(0)
    # What comes meanwhile stays in the stream, which pauses its engine where it is too much.
    assert (client.tokens, relayed.output.tokens) == ([1], [1, 2])
    client.catch_up()
    assert await relayed.task == [Delta(token_ids=[3]), Delta(token_ids=[4])]
    assert client.tokens == [1, 2]


async def test_what_ends_something_is_not_given_at_once(client: Client, relayed: Relayed) -> None:
    feed(relayed.stream, event(2, more='"finish_reason":"length"'))
    assert await relayed.task == [Delta(token_ids=[2], finish_reason="length")]
    assert client.tokens == [1]


@pytest.mark.parametrize("behind", [False, True])
async def test_a_stop_string_ends_the_output(client: Client, relayed: Relayed, behind: bool) -> None:
    client.behind = behind
    feed(relayed.stream, event(9))
    feed(relayed.stream, event(10))
    await asyncio.sleep(0)
    client.catch_up()
    assert await relayed.task == []
    assert relayed.output.finished
    assert client.tokens == [1, 9]


async def test_what_was_not_awaited_is_dropped(client: Client, relayed: Relayed) -> None:
    """Otherwise Python warns, which fails this test."""
    client.behind = True
    feed(relayed.stream, event(2))
    relayed.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relayed.task
    relayed.relay.close()


async def test_tokens_are_taken_alone_while_the_client_keeps_up() -> None:
    client, merged = EagerClient(), MergedTokens()
    stream, output = opened(event(1), merged=merged), Output()
    relay = Relay(stream, output, client)
    await output.deliver(await relay.next(), client)
    task = asyncio.create_task(relay.next())
    await asyncio.sleep(0)
    for position, token in ((1, 2), (2, 3)):
        stream.receive_step_tokens(position, [token])
    stream.wake()
    client.behind = True
    stream.receive_step_tokens(3, [4])
    stream.wake()
    await asyncio.sleep(0)
    client.catch_up()
    stream.receive_step_tokens(4, [5])
    assert await task == [Delta(token_ids=[5])]
    assert (client.alone, client.tokens) == ([2, 3], [1, 2, 3, 4])
    assert output.tokens == [1, 2, 3, 4]
    assert output.longest_gap_s > 0


async def test_a_batch_is_for_who_takes_no_tokens_alone(client: Client) -> None:
    stream, output = opened(event(1), merged=MergedTokens()), Output()
    relay = Relay(stream, output, client.emit)
    await output.deliver(await relay.next(), client.emit)
    task = asyncio.create_task(relay.next())
    await asyncio.sleep(0)
    stream.receive_step_tokens(1, [2])
    stream.wake()
    assert client.tokens == output.tokens == [1, 2]
    task.cancel()
