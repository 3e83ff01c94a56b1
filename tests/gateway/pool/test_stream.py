"""A stream's tokens as they arrive: each once and in order, whichever way its events are read."""

import asyncio
from collections.abc import Callable

import pytest

from ares.gateway.pool.connection import Connection
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.merged_tokens import DifferentTokensError, MergedTokens
from ares.gateway.pool.stream import Stream
from tests.transports import Nowhere

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ERROR = b'data: {"error":{"message":"no memory","code":503}}\n\n'


def event(*tokens: int, more: str = '"logprobs":null,"finish_reason":null,"stop_reason":null') -> bytes:
    ids = ",".join(map(str, tokens))
    return b'data: {"request_id":"a","choices":[{"index":0,"token_ids":[%b],%b}]}\n\n' % (ids.encode(), more.encode())


def opened(*reads: bytes, merged: MergedTokens | None = None) -> Stream:
    """A stream whose connection has brought these parts of its body."""
    connection, stream = Connection(), Stream(merged=merged)
    connection.connection_made(Nowhere())
    connection.send(b"", stream)
    received(stream, HEAD)
    for data in reads:
        feed(stream, data)
    return stream


def received(stream: Stream, data: bytes) -> None:
    assert stream.connection is not None
    stream.connection.data_received(data)


def feed(stream: Stream, data: bytes) -> None:
    received(stream, b"%x\r\n%b\r\n" % (len(data), data))


def lose(stream: Stream) -> None:
    assert stream.connection is not None
    stream.connection.connection_lost(None)


class Reader:
    """Takes the tokens of a stream by a function, and single ones of the step channel up to a number of them."""

    def __init__(self, take: Callable[[list[Delta]], bool], singles: int = 0) -> None:
        self.take = take
        self.tokens: list[int] = []
        self._singles = singles

    def take_token(self, token_id: int) -> bool:
        if len(self.tokens) == self._singles:
            return False
        self.tokens.append(token_id)
        return True


class FailingReader(Reader):
    """Fails with every single token."""

    def take_token(self, token_id: int) -> bool:
        raise OSError("of the reader")


async def waiting(
    stream: Stream, take: Callable[[list[Delta]], bool], reader: Reader | None = None
) -> "asyncio.Task[list[Delta]]":
    """Wait for the next tokens in a task, which waits when this returns."""
    task = asyncio.create_task(stream.batch(reader or Reader(take)))
    await asyncio.sleep(0)
    assert stream.starved
    return task


LOGPROBS = '"logprobs":{"content":[{"token_id":7,"logprob":-1.0}]},"finish_reason":null,"stop_reason":null'


async def until_five(stream: Stream) -> list[list[Delta]]:
    """All batches until the token 5."""
    batches = [await stream.batch()]
    while (batches[-1][-1].token_ids or [0])[-1] != 5:
        batches.append(await stream.batch())
    return batches


@pytest.mark.parametrize(
    "reads",
    [
        [event(8)],
        [event(0)],
        [event(8, 9)],
        [event(8) + event(9)],
        [event(8) + event(9)[:20], event(9)[20:]],
        [event(8)[:-1], event(8)[-1:]],
        [event(8)[:60], event(8)[60:], event(9)],
        [event((1 << 32) - 1)],
        [event(8, more=LOGPROBS), event(8)],
        [event(8, more='"finish_reason":"length","stop_reason":null')],
        [event(8, more='"logprobs":null,"finish_reason":null,"stop_reason":"ares_migrated"')],
        [event(8).replace(b'"a"', b'"b"'), event(8)],
        [event(8).replace(b"[8]", b"[ 8 ]")],
        [event()],
        [b'data: {"choices":[]}\n\n' + event(8)],
        [b"data: [DONE]\n\n"],
    ],
)
async def test_events_are_read_as_if_they_were_the_first(reads: list[bytes]) -> None:
    """After an event of one token, the form of which the next is held against."""
    alone, after = opened(), opened(event(7))
    assert await after.batch() == [Delta(token_ids=[7])]
    for stream in (alone, after):
        for data in (*reads, event(5)):
            feed(stream, data)
    assert await until_five(after) == await until_five(alone)


async def test_each_read_gives_its_own_tokens() -> None:
    stream, found = opened(), []
    for data in (event(6, more=LOGPROBS), event(7), event(8), event(8, more=LOGPROBS), event(10, 11), event(9)):
        feed(stream, data)
        (delta,) = await stream.batch()
        found.append((delta.token_ids, delta.logprobs is not None))
    assert found == [([6], True), ([7], False), ([8], False), ([8], True), ([10, 11], False), ([9], False)]


@pytest.mark.parametrize("broken", [b"[07]", b"[-]", b"[-7]", b"[4294967296]", b"[7.5]", b"[]]", b'["7"]', b"[7"])
async def test_a_broken_event_after_whole_ones_is_a_loss(broken: bytes) -> None:
    stream = opened(event(7))
    await stream.batch()
    feed(stream, event(7).replace(b"[7]", broken))
    with pytest.raises(EngineLostError, match="the stream broke"):
        await stream.batch()


async def test_tokens_are_taken_as_they_arrive() -> None:
    stream, taken = opened(), list[int]()

    def take(batch: list[Delta]) -> bool:
        taken.extend(token for delta in batch for token in delta.token_ids or [])
        return taken[-1] < 5

    task = await waiting(stream, take)
    for token in range(1, 5):
        feed(stream, event(token))
        assert taken[-1] == token
    feed(stream, event(4)[:30])
    feed(stream, event(4)[30:] + event(5))
    feed(stream, event(6))  # before the reader has run
    assert await task == [Delta(token_ids=[4]), Delta(token_ids=[5])]
    assert taken == [1, 2, 3, 4, 4, 5]
    assert await stream.batch(take) == [Delta(token_ids=[6])]


async def test_the_end_of_the_reply_wakes_the_reader() -> None:
    stream = opened()
    task = await waiting(stream, lambda _: True)
    feed(stream, event(1))
    received(stream, b"0\r\n\r\n")
    assert await task == []


async def test_the_end_with_the_last_tokens_wakes_the_reader() -> None:
    stream, data = opened(), event(1)
    task = await waiting(stream, lambda _: True)
    received(stream, b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
    assert await task == []


async def test_a_lost_connection_wakes_the_reader() -> None:
    stream = opened()
    task = await waiting(stream, lambda _: True)
    feed(stream, event(1))
    lose(stream)
    with pytest.raises(EngineLostError, match="the connection was closed"):
        await task


@pytest.mark.parametrize(("data", "error"), [(ERROR, EngineRefusedError), (b"data: {\n\n", EngineLostError)])
async def test_errors_of_the_engine_reach_the_reader(data: bytes, error: type[Exception]) -> None:
    stream = opened()
    task = await waiting(stream, lambda _: True)
    feed(stream, data)
    with pytest.raises(error):
        await task


async def test_what_taking_raises_reaches_the_reader_as_it_is() -> None:
    def take(_: list[Delta]) -> bool:
        raise ValueError("of the taker")

    stream = opened()
    task = await waiting(stream, take)
    feed(stream, event(1))
    with pytest.raises(ValueError, match="of the taker"):
        await task


async def test_nothing_is_taken_for_a_reader_that_has_left() -> None:
    stream, taken = opened(), list[Delta]()

    def take(batch: list[Delta]) -> bool:
        taken.extend(batch)
        return True

    task = await waiting(stream, take)
    task.cancel()
    feed(stream, event(1))
    with pytest.raises(asyncio.CancelledError):
        await task
    feed(stream, event(2))
    assert not taken
    assert await stream.batch() == [Delta(token_ids=[1]), Delta(token_ids=[2])]


def early(*reads: bytes) -> Stream:
    """As `opened`, with a step channel."""
    return opened(*reads, merged=MergedTokens())


ENDED = '"logprobs":null,"finish_reason":"length","stop_reason":"migrated"'


async def test_tokens_of_the_step_channel_come_before_their_events_and_once() -> None:
    stream, taken = early(event(5)), list[int]()

    def take(batch: list[Delta]) -> bool:
        taken.extend(token for delta in batch for token in delta.token_ids or [])
        return batch[-1].finish_reason is None

    assert await stream.batch() == [Delta(token_ids=[5])]
    task = await waiting(stream, take)
    stream.receive_step_tokens(0, [5])
    stream.receive_step_tokens(1, [6])
    stream.receive_step_tokens(2, [7])
    assert taken == []
    stream.wake()
    assert taken == [6, 7]
    feed(stream, event(6, 7, 8))
    assert taken == [6, 7, 8]
    stream.receive_step_tokens(3, [8])
    stream.receive_step_tokens(4, [9])
    stream.wake()
    feed(stream, event(9, more=ENDED))
    assert await task == [Delta(token_ids=[], finish_reason="length", stop_reason="migrated")]
    assert taken == [6, 7, 8, 9]


async def test_tokens_that_come_early_are_there_when_the_stream_breaks() -> None:
    stream = early(event(5))
    stream.receive_step_tokens(1, [6])
    lose(stream)
    assert await stream.batch() == [Delta(token_ids=[5]), Delta(token_ids=[6])]
    with pytest.raises(EngineLostError):
        await stream.batch()


async def test_tokens_that_come_before_the_first_event_are_read_first() -> None:
    stream = early()
    stream.receive_step_tokens(0, [5])
    assert await stream.batch() == [Delta(token_ids=[5])]
    feed(stream, event(5, 6, more=ENDED))
    assert await stream.batch() == [Delta(token_ids=[6], finish_reason="length", stop_reason="migrated")]


async def test_channels_that_disagree_end_the_stream() -> None:
    stream = early()
    stream.receive_step_tokens(0, [5])
    assert await stream.batch() == [Delta(token_ids=[5])]
    feed(stream, event(4))
    with pytest.raises(DifferentTokensError):
        await stream.batch()


@pytest.mark.parametrize("finish", ["stop", "length", "abort"])
async def test_a_reply_that_ends_before_what_came_early(finish: str) -> None:
    """The client has tokens that are not the output's; where the instance gave up, they are: it resumes behind them."""
    stream = early(event(5))
    stream.receive_step_tokens(1, [6, 7])
    assert len(await stream.batch()) == 2
    feed(stream, event(6, more=f'"finish_reason":"{finish}"'))
    if finish == "abort":
        assert await stream.batch() == [Delta(token_ids=[], finish_reason="abort")]
    else:
        with pytest.raises(DifferentTokensError):
            await stream.batch()


async def test_single_tokens_of_the_step_channel_are_taken_alone() -> None:
    stream, batches = opened(merged=MergedTokens()), list[list[Delta]]()
    reader = Reader(lambda batch: not batches.append(batch), singles=3)
    task = await waiting(stream, reader.take, reader)
    for position, token_ids in ((0, [5]), (1, [6]), (2, [7, 8]), (4, [9])):
        stream.receive_step_tokens(position, token_ids)
    stream.wake()
    # The order is kept: what comes behind tokens of one step that belong together comes with them.
    assert reader.tokens == [5, 6]
    assert batches == [[Delta(token_ids=[7, 8]), Delta(token_ids=[9])]]
    stream.receive_step_tokens(5, [10])
    stream.receive_step_tokens(6, [11])
    stream.wake()
    assert reader.tokens == [5, 6, 10]
    assert batches[1:] == [[Delta(token_ids=[11])]]
    # The reply has them all once more, and the end.
    feed(stream, event(*range(5, 12)))
    feed(stream, event(12, more='"finish_reason":"length"'))
    assert (reader.tokens, len(batches)) == ([5, 6, 10], 3)
    assert batches[2] == [Delta(token_ids=[12], finish_reason="length")]
    task.cancel()


async def test_what_taking_a_token_raises_is_raised() -> None:
    stream = opened(merged=MergedTokens())
    reader = FailingReader(lambda _: True)
    task = await waiting(stream, reader.take, reader)
    stream.receive_step_tokens(0, [5])
    stream.wake()
    with pytest.raises(OSError, match="of the reader"):
        await task
