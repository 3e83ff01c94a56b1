"""Sessions over fake instances: what runs them, and what they are to give."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.pool.pool import Pool
from ares.gateway.session.handover import MigrationRecord
from ares.gateway.session.placement import Placement
from ares.gateway.session.session import Session
from ares.gateway.tuning import DEFAULT, Tuning
from tests.gateway.fakes import FakeInstance, expected
from tests.waiting import eventually

# Of the fakes and of the tokenizer (tests/gateway/conftest.py).
VOCABULARY = 259
PROMPT = [10, 20, 30, 40, 50]
# Name of the gateway, of a session's too where none is given.
GATEWAY = "gateway"
# Notices a silent instance after tenths of a second.
IMPATIENT = Tuning(silent_s=0.3, silent_intervals=5, reconnect_s=0.05)


class FakeCluster:
    """A pool over fakes, and the choice of instances for its sessions: the first open instance that may be used."""

    def __init__(self, fakes: list[FakeInstance], pool: Pool) -> None:
        self.fakes = {fake.name: fake for fake in fakes}
        self.pool = pool
        self.order = [fake.name for fake in fakes if fake.role != "prefill"]

    def choose_prefill(self, placement: Placement, _: Instance | None) -> Instance | None:
        adapter = placement.sampling.adapter
        able = (i for i in self.pool.instances if i.role == "prefill" and i.state.serves(adapter))
        return next((i for i in able if i.open), None)

    def decode_began(self, *_: object) -> None:
        """Nothing follows from it."""

    def prefill_ended(self, *_: object) -> None:
        """Nothing follows from it."""

    async def admit(self, session: Session, exclude: set[str]) -> Instance:
        for _ in range(15):
            usable = {i.name: i for i in self.pool.decode_instances if i.open and i.name not in exclude}
            chosen = next((usable[name] for name in self.order if name in usable), None)
            if chosen is not None:
                return chosen
            await asyncio.sleep(0.2)
        raise NoInstanceError("no decode instance is ready")

    def instance(self, name: str) -> Instance:
        found = self.pool.find(name)
        assert found is not None
        return found

    async def quiet(self) -> None:
        """Wait until no fake generates or pins anything."""
        for fake in self.fakes.values():
            await fake.until(lambda fake=fake: fake.quiet)


class Run:
    """A session that runs, and what it gave out."""

    def __init__(
        self, cluster: FakeCluster, sampling: Sampling, prompt: list[int], timeout_s: float, maximum_attempts: int = 3
    ) -> None:
        self.session = Session("request", prompt, sampling, cluster, timeout_s, maximum_attempts=maximum_attempts)
        self.cluster = cluster
        self.tokens: list[int] = []
        self.deltas: list[Delta] = []
        self.stop_after: int | None = None
        self._changed = asyncio.Condition()
        self.task = asyncio.create_task(self.session.run(self._emit))

    async def _emit(self, batch: list[Delta]) -> bool:
        async with self._changed:
            for delta in batch:
                self.deltas.append(delta)
                self.tokens += delta.token_ids or []
            self._changed.notify_all()
        return self.stop_after is not None and len(self.tokens) >= self.stop_after

    async def reached(self, count: int) -> None:
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: len(self.tokens) >= count)

    async def move(self, target: str) -> MigrationRecord:
        """Move; a source that outruns the order, on a busy machine, is held back before it is finished."""
        source = self.where if self.session.instance is not None else None
        if source is not None and source.hold_at is None:
            source.hold_at = self.session.tokens + 20
        else:
            source = None
        try:
            async with asyncio.timeout(60):
                return await self.session.hand_over(self.cluster.instance(target), "test")
        finally:
            if source is not None:
                source.hold_at = None

    @contextlib.asynccontextmanager
    async def unread(self) -> AsyncIterator[None]:
        """Take nothing of the session meanwhile."""
        async with self._changed:
            yield

    async def finish(self) -> list[int]:
        async with asyncio.timeout(60):
            await self.task
        assert self.tokens == self.session.emitted
        return self.tokens

    async def leave(self) -> None:
        """Leave as a client does."""
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task

    @property
    def where(self) -> FakeInstance:
        assert self.session.instance is not None
        return self.cluster.fakes[self.session.instance.name]

    @property
    def finish_reasons(self) -> list[str]:
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]


Start = Callable[..., Run]


async def start_pool(fakes: list[FakeInstance], tuning: Tuning = DEFAULT) -> tuple[Pool, Any]:
    http = http_client()
    pool = Pool([fake.url for fake in fakes], http, 0.02, gateway=GATEWAY, tuning=tuning)
    pool.start()
    await eventually(lambda: all(i.health.healthy and i.state.hello for i in pool.instances), 15)
    return pool, http


async def move_once(cluster: FakeCluster, start: Start, maximum: int, *outcomes: str, **options: Any) -> None:
    """Move a request once: whatever comes of it, every token comes once, and nothing is left behind."""
    run = start(maximum, **options)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome in outcomes
    assert await run.finish() == undisturbed(maximum)
    await cluster.quiet()


def undisturbed(count: int, prompt: list[int] = PROMPT, eos_at: int | None = None) -> list[int]:
    return expected(prompt, count, vocabulary=VOCABULARY, eos_at=eos_at)


def hold(cluster: FakeCluster, output: int) -> None:
    """Let no decode instance generate further than so many output tokens."""
    for fake in cluster.fakes.values():
        fake.hold_at = len(PROMPT) + output


def stop_holding(cluster: FakeCluster) -> None:
    for fake in cluster.fakes.values():
        fake.hold_at = None
