"""Pinned KV whose gateway is gone."""

import asyncio

import pytest

from ares.mock_engine.pins import Pin, Pins
from ares.protocol import rpc
from tests.waiting import eventually


async def test_what_is_kept_for_a_gateway_that_has_gone_ends_soon_but_for_who_pulls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "ORPHAN_LEASE_S", 0.05)
    freed: list[int] = []
    pins = Pins(600.0, freed.append)
    for blocks, key in enumerate(("dead/1/1", "dead/2/1", "alive/1/1", None)):
        pins.add(Pin(f"request-{blocks}", key, 10, 0, blocks))
    pins.orphan("dead")
    pins.extend(["request-1"])  # its target speaks up
    await eventually(lambda: freed == [0])
    await asyncio.sleep(0.1)
    assert freed == [0]
    assert (len(pins), pins.counts.expired) == (3, 1)
    pins.clear()


async def test_a_lease_that_ends_sooner_is_not_made_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "ORPHAN_LEASE_S", 600.0)
    freed: list[int] = []
    pins = Pins(0.05, freed.append)
    pins.add(Pin("request", "dead/1/1", 10, 0, 7))
    pins.orphan("dead")
    await eventually(lambda: freed == [7])
