"""What an instance has cached, by its KV events or by what was sent there; wrong events cost no more than time."""

from typing import Any

import pytest

from ares.gateway.pool import cached_blocks
from ares.gateway.pool.cached_blocks import CachedBlocks
from ares.gateway.pool.prompt_blocks import PromptBlocks
from ares.protocol import kv_events, messages

SIZE = 4
PROMPT = list(range(100, 122))


def hashes(tokens: list[int] = PROMPT, adapter: str | None = None, salt: str | None = None) -> list[bytes]:
    return PromptBlocks(adapter, salt).hashes(tokens, [], SIZE)


def stored(begin: int = 0, end: int = 5, tokens: list[int] = PROMPT, **changes: Any) -> kv_events.BlockStored:
    names: list[kv_events.BlockHash] = [bytes([n]) for n in range(begin, end)]
    parent = bytes([begin - 1]) if begin else None
    event = kv_events.BlockStored(names, parent, tokens[begin * SIZE : end * SIZE], SIZE, "GPU")
    return kv_events.BlockStored(**{name: changes.get(name, getattr(event, name)) for name in event.__struct_fields__})


def removed(*numbers: int, **changes: Any) -> kv_events.BlockRemoved:
    return kv_events.BlockRemoved([bytes([n]) for n in numbers], **changes)


def batch(*changes: kv_events.Change) -> bytes:
    return kv_events.encode(kv_events.Batch(0.0, list(changes)))


class Publishing:
    """An instance's blocks, and its events."""

    def __init__(self) -> None:
        self.blocks = CachedBlocks(SIZE, 100, publishes=True)
        self.number = 0

    def tell(self, *changes: kv_events.Change) -> messages.FollowKvEvents | None:
        self.number += 1
        return self.blocks.receive(messages.KvEvents(self.number - 1, 0, [batch(*changes)]))


def test_full_blocks_are_named_by_all_that_is_before_them() -> None:
    blocks = PromptBlocks(None, None)
    assert len(blocks.hashes(PROMPT, [], SIZE)) == 5
    for output in ([7], [7, 8], [7, 8, 9, 10, 11, 12]):
        assert blocks.hashes(PROMPT, output, SIZE) == hashes([*PROMPT, *output]), "as the output grows"
    assert blocks.hashes(PROMPT, [], 2)[1] != hashes()[1]
    assert not set(hashes()) & set(hashes([1, *PROMPT[1:]]))
    assert not set(hashes()) & (set(hashes(adapter="a")) | set(hashes(salt="a")))
    assert hashes(adapter="a") != hashes(salt="a")


def test_blocks_come_and_go() -> None:
    instance = Publishing()
    instance.tell(stored(0, 2))
    instance.tell(stored(2, 5), stored(0, 1))
    assert instance.blocks.leading(hashes()) == 5
    assert instance.blocks.leading(hashes([*PROMPT[:9], *[1] * 20])) == 2
    instance.tell(removed(4, 3), removed(0))
    assert instance.blocks.leading(hashes()) == 3, "of two blocks with the same content one is left"
    instance.tell(removed(2, 1, 0))
    assert instance.blocks.leading(hashes()) == 0
    instance.tell(stored(0, 1), kv_events.AllBlocksCleared())
    assert len(instance.blocks) == 0


@pytest.mark.parametrize(
    ("change", "adapter", "salt"),
    [
        ({"lora_name": "a", "extra_keys": [["a", "s"], *[["a"]] * 4]}, "a", "s"),
        ({"lora_name": "a", "extra_keys": [["a"]] * 5}, "a", None),
        ({"extra_keys": [["s"], *[None] * 4]}, None, "s"),
        ({"extra_keys": None}, None, None),
    ],
)
def test_adapter_and_salt_count(change: dict[str, Any], adapter: str | None, salt: str | None) -> None:
    instance = Publishing()
    instance.tell(stored(**change))
    assert instance.blocks.leading(hashes(adapter=adapter, salt=salt)) == 5
    for other in ((None, None), ("a", None), (None, "s"), ("a", "s")):
        if other != (adapter, salt):
            assert instance.blocks.leading(hashes(PROMPT, *other)) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 8},
        {"token_ids": [1, 2, 3]},
        {"token_ids": [-1] * 20},
        {"token_ids": [1 << 40] * 20},
        {"parent_block_hash": b"unknown"},
        {"medium": "CPU"},
        {"group_idx": 1},
        {"extra_keys": [[["image", 0]], *[None] * 4]},
        {"extra_keys": [None, [["image", 0]], *[None] * 3]},
        {"extra_keys": [["s", "t"], *[None] * 4]},
    ],
)
def test_what_cannot_be_known_from_tokens_is_left_out(change: dict[str, Any]) -> None:
    instance = Publishing()
    instance.tell(stored(**change))
    assert len(instance.blocks) == 0


def test_of_blocks_with_one_hash_the_newest_counts() -> None:
    instance = Publishing()
    for first in range(500):
        instance.tell(stored(0, 2, [first, *PROMPT[1:]]))
    assert len(instance.blocks) == instance.blocks.leading(hashes([499, *PROMPT[1:]])) == 2
    instance.tell(removed(0, 1))
    assert len(instance.blocks) == 0


def test_what_is_elsewhere_does_not_leave_with_it() -> None:
    instance = Publishing()
    instance.tell(stored(), removed(0, medium="CPU"), removed(1, group_idx=1), removed(99))
    assert instance.blocks.leading(hashes()) == 5


def test_missing_batches_are_asked_for_once_and_then_applied_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(cached_blocks.time, "monotonic", lambda: now)
    blocks = CachedBlocks(SIZE, 100, publishes=True)
    first, second, third = batch(stored(0, 1)), batch(stored(1, 2)), batch(stored(2, 3))
    assert blocks.receive(messages.KvEvents(0, 0, [first])) is None
    assert blocks.receive(messages.KvEvents(2, 0, [third])) == 1
    assert blocks.receive(messages.KvEvents(2, 0, [third])) is None, "not at each one"
    now += 5
    assert blocks.receive(messages.KvEvents(2, 0, [third])) == 1
    assert blocks.receive(messages.KvEvents(0, 0, [first, second, third])) is None
    assert blocks.receive(messages.KvEvents(1, 0, [second])) is None
    assert blocks.leading(hashes()) == 3
    assert blocks.status == {"blocks": 3, "publishes": True, "replays": 2, "lost": 0, "ignored_blocks": 0}


def test_parts_of_what_is_kept_are_asked_for_one_after_the_other() -> None:
    blocks = CachedBlocks(SIZE, 100, publishes=True)
    first, second = batch(stored(0, 1)), batch(stored(1, 2))
    assert blocks.receive(messages.KvEvents(3, 3, [first], end=5)) == 4
    assert blocks.receive(messages.KvEvents(4, 3, [second], end=5)) is None
    assert blocks.receive(messages.KvEvents(5, 3, [], end=5)) is None
    assert blocks.receive(messages.KvEvents(5, 3, [], end=9)) is None, "an answer that brings nothing"
    assert blocks.receive(messages.KvEvents(4, 3, [second], end=9)) is None
    assert (blocks.leading(hashes()), blocks.next, blocks.lost) == (2, 5, 0)


def test_a_long_prompt_is_looked_up_in_a_few_steps() -> None:
    class Counted(list[bytes]):
        looked_at = 0

        def __getitem__(self, index: Any) -> Any:
            self.looked_at += 1
            return super().__getitem__(index)

    blocks = CachedBlocks(SIZE, 1 << 16, publishes=True)
    wanted = Counted(n.to_bytes(4, "big") for n in range(8192))
    for known in (0, 1, 5000, 8191, 8192):
        blocks.sent(wanted[:known])
        wanted.looked_at = 0
        assert blocks.leading(wanted) == known
        assert wanted.looked_at <= 14


def test_what_is_lost_for_good_is_forgotten() -> None:
    instance = Publishing()
    instance.tell(stored(0, 3))
    assert instance.blocks.receive(messages.KvEvents(8, 7, [b""])) == 7
    assert instance.blocks.receive(messages.KvEvents(7, 7, [batch(stored(0, 1))])) is None
    assert (instance.blocks.leading(hashes()), instance.blocks.lost) == (1, 1)
    instance.blocks.receive(messages.KvEvents(8, 7, [b""]))
    assert (len(instance.blocks), instance.blocks.lost) == (0, 2), "an empty batch: lost on the instance"
    instance.blocks.receive(messages.KvEvents(9, 7, [b"no batch", batch(stored(0, 2))]))
    assert instance.blocks.leading(hashes()) == 2


def test_a_gateway_that_comes_late_starts_with_what_is_kept() -> None:
    blocks = CachedBlocks(SIZE, 100, publishes=True)
    assert blocks.receive(messages.KvEvents(40, 40, [batch(stored(0, 2))])) is None
    assert (blocks.leading(hashes()), blocks.lost) == (2, 0)


def test_blocks_that_were_sent_and_then_stored_are_counted_once() -> None:
    instance = Publishing()
    instance.blocks.sent(hashes()[:3])
    instance.tell(stored(0, 2))
    instance.blocks.sent(hashes()[:4])
    assert instance.blocks.status["blocks"] == instance.blocks.leading(hashes()) == 4
    instance.tell(removed(0, 1))
    assert instance.blocks.status["blocks"] == 2


@pytest.mark.parametrize(("publishes", "kept_s"), [(False, 300.0), (True, 15.0)])
def test_what_was_sent_counts_for_a_while(publishes: bool, kept_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(cached_blocks.time, "monotonic", lambda: now)
    blocks = CachedBlocks(SIZE, 100, publishes=publishes)
    blocks.sent(hashes()[:3])
    assert blocks.leading(hashes()) == 3
    now += kept_s - 1
    assert blocks.leading(hashes()) == 3
    now += 2
    assert blocks.leading(hashes()) == 0
    assert len(blocks) == 0
    blocks.sent([b"other"])
    assert len(blocks) == 1


@pytest.mark.parametrize("publishes", [False, True])
def test_soon_after_the_host_has_started_nothing_counts_as_sent(
    publishes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock counts from the start of the host: then it is lower than the time for which blocks count as cached."""
    monkeypatch.setattr(cached_blocks.time, "monotonic", lambda: 5.0)
    blocks = CachedBlocks(SIZE, 100, publishes=publishes)
    assert blocks.leading(hashes()) == 0
    blocks.sent(hashes()[:3])
    assert blocks.leading(hashes()) == 3


def test_no_more_is_kept_than_the_instance_has_blocks() -> None:
    blocks = CachedBlocks(SIZE, 4)
    blocks.sent(hashes([*range(40)]))
    assert (len(blocks), blocks.leading(hashes([*range(40)]))) == (4, 4)
    publishing = CachedBlocks(SIZE, 4, publishes=True)
    publishing.receive(messages.KvEvents(0, 0, [batch(stored())]))
    assert len(publishing) == 4
    nothing = CachedBlocks(SIZE, 0)
    nothing.sent(hashes())
    assert nothing.leading(hashes()) == 0
