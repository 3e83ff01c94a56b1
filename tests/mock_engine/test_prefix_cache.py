"""The prefix cache of a mock instance: what is cached is not computed again, and gateways know it by the events."""

from collections.abc import Iterator

import pytest

from ares.gateway.pool.cached_blocks import CachedBlocks
from ares.gateway.pool.prompt_blocks import PromptBlocks
from ares.mock_engine.prefix_cache import PrefixCache
from ares.protocol import messages, rpc
from tests.engine.control_channel import until
from tests.mock_engine.cluster import PROMPT, serving, settings
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)
SIZE = 4


@pytest.fixture
def cache() -> Iterator[PrefixCache]:
    made = PrefixCache(6, SIZE)
    yield made
    made.close()
    assert made.log is not None
    made.log.close()


def known(cache: PrefixCache, batches: int) -> CachedBlocks:
    """What a gateway makes of its events."""
    blocks, log = CachedBlocks(SIZE, 100, publishes=True), cache.log
    assert log is not None
    until(lambda: not log.read() and sum(len(_event(body).batches) for body in log.since(0)) == batches)
    for body in log.since(0):
        blocks.receive(_event(body))
    return blocks


def _event(body: bytes) -> messages.KvEvents:
    event = rpc.decode_event(body)
    assert isinstance(event, messages.KvEvents)
    return event


def test_whole_blocks_are_cached_and_one_token_is_always_computed(cache: PrefixCache) -> None:
    tokens = list(range(18))
    assert cache.cached(tokens, "") == 0
    cache.store(tokens, "")
    assert cache.cached(tokens, "") == 16
    assert cache.cached(tokens[:16], "") == 12
    assert cache.cached([*tokens[:9], 1, 2, 3, 4], "") == 8
    assert cache.cached([5, *tokens[1:]], "") == 0
    assert cache.cached(tokens, "salt") == 0


def test_the_least_recently_used_blocks_leave_last_ones_first(cache: PrefixCache) -> None:
    first, second = list(range(16)), list(range(100, 112))
    cache.store(first, "")
    cache.store(second, "s")
    assert (cache.cached([*first, 1], ""), cache.cached([*second, 1], "s")) == (12, 12)
    blocks = known(cache, 2)
    assert blocks.leading(PromptBlocks(None, None).hashes(first, [], SIZE)) == 3
    assert blocks.leading(PromptBlocks(None, "s").hashes(second, [], SIZE)) == 3


async def test_a_gateway_knows_what_an_instance_has_cached() -> None:
    async with serving(settings(prefix_caching=True), "decode") as cluster:
        instance = cluster.known("decode-0")
        instance.wants_kv_events = True
        body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 2, "ignore_eos": True}}
        hashes = PromptBlocks(None, None).hashes(PROMPT, [], instance.state.cached.block_size)
        outputs = []
        for _ in range(2):
            delta, _ = await instance.engine.complete({**body, "kv_transfer_params": {"ares_key": "a"}})
            outputs.append(delta.token_ids)
        assert outputs[0] == outputs[1]
        assert cluster.counters("decode-0")["prompt_tokens_computed"] == len(PROMPT) + len(PROMPT) % 16
        await eventually(lambda: instance.state.cached.leading(hashes) == len(hashes))
