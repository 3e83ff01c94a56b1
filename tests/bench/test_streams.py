"""Streams that are watched say why they ended; random prompts fit every model."""

import asyncio
import random

import pytest

from ares.bench import sse
from ares.bench.live.load import random_prompt
from ares.bench.streams import Watched
from tests.bench.test_sse import DONE, EVENTS, bytewise, chunked, served
from tests.integration.tiny_model import VOCABULARY


def test_random_prompts_are_within_the_smallest_vocabulary() -> None:
    prompt = random_prompt(random.Random(1), 5000)
    assert len(prompt) == 5000
    assert max(prompt) < VOCABULARY
    assert len(set(prompt)) > 500


REFUSED = b"HTTP/1.1 400 Bad\r\ncontent-length: 21\r\n\r\ntoken 5000 is unknown"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            b"HTTP/1.1 400 Bad\r\ncontent-length: 21\r\n\r\ntoken 5000 is unknown",
            "0 tokens of 3: 400: token 5000 is unknown",
        ),
        (chunked(*EVENTS[:2], b'data: {"error":{"message":"lost"}}\n\n', DONE), "1 tokens of 3: lost"),
        (chunked(EVENTS[0], DONE), "1 tokens of 3: no error"),
    ],
)
async def test_a_stream_that_ends_early_says_what_the_server_said(reply: bytes, message: str) -> None:
    watched = Watched()
    async with served(bytewise(reply)) as port, sse.session() as http:
        stream = asyncio.create_task(watched.follow(http, f"http://127.0.0.1:{port}", {}, "r-1"))
        with pytest.raises(sse.StreamError, match=message):
            await watched.reach(3, stream)


async def test_a_stream_is_watched_until_it_has_as_many_tokens() -> None:
    watched = Watched()
    async with served(bytewise(chunked(*EVENTS, DONE))) as port, sse.session() as http:
        stream = asyncio.create_task(watched.follow(http, f"http://127.0.0.1:{port}", {}, "r-1"))
        await watched.reach(2, stream)
        await stream
    assert watched.times == sorted(watched.times)
