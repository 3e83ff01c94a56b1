"""KV that waits to be pulled: whatever happens, its instance is told once that nobody will, or never (I5)."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ares.gateway.session.pinned_kv import PinnedKV


class Instance:
    def __init__(self) -> None:
        self.released: list[str] = []
        self.broken = False
        self.control = self
        self.subscription = SimpleNamespace(number=1, unbroken=lambda since: not self.broken)

    async def release(self, key: str) -> None:
        self.released.append(key)


@pytest.fixture
def instance() -> Any:
    return Instance()


async def released(instance: Instance) -> list[str]:
    await asyncio.sleep(0.01)
    return instance.released


async def test_it_is_freed_once(instance: Any) -> None:
    kv = PinnedKV()
    kv.free()
    kv.add(instance, "a")
    kv.free()
    kv.free()
    kv.close()
    assert await released(instance) == ["a"]


async def test_what_is_being_pulled_is_left_to_its_puller(instance: Any) -> None:
    kv = PinnedKV()
    kv.add(instance, "a")
    assert kv.take() is not None
    kv.free()
    kv.close()
    assert await released(instance) == []


async def test_what_was_not_pulled_after_all_waits_again(instance: Any) -> None:
    kv = PinnedKV()
    kv.add(instance, "a")
    kv.put_back(kv.take())
    assert kv.kept
    assert await released(instance) == []
    kv.free()
    assert await released(instance) == ["a"]


async def test_what_comes_back_after_the_end_is_freed(instance: Any) -> None:
    kv = PinnedKV()
    kv.add(instance, "a")
    pin = kv.take()
    kv.close()
    kv.put_back(pin)
    kv.close()
    assert await released(instance) == ["a"]


async def test_what_comes_back_late_does_not_displace_what_is_pinned_now(instance: Any) -> None:
    """A target that fails after its hand-over was given up: the request may be on its way elsewhere."""
    kv = PinnedKV()
    kv.add(instance, "a")
    pin = kv.take()
    kv.add(instance, "b")
    kv.put_back(pin)
    assert await released(instance) == ["a"]
    kv.free()
    assert await released(instance) == ["a", "b"]


async def test_what_nobody_pulled_does_not_stay_behind_the_next(instance: Any) -> None:
    """As after a prefill whose answer did not say how to pull."""
    kv = PinnedKV()
    kv.add(instance, "a")
    kv.add(instance, "b")
    kv.add(instance, "b")
    kv.free()
    assert await released(instance) == ["a", "b"]


async def test_it_is_kept_until_its_lease_may_have_ended(instance: Any) -> None:
    kv = PinnedKV(kept_s=0.2)
    assert not kv.kept
    kv.add(instance, "a")
    await asyncio.sleep(0.25)
    assert not kv.kept
    kv.confirm()  # a long prefill: it has been pinned only now
    assert kv.kept
    instance.broken = True
    assert not kv.kept
