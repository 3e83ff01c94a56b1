"""A gateway over fake instances, and clients of it: what several tests of the gateway start from."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from ares.config import GatewayConfig
from ares.gateway.control.snapshot import ClusterSnapshot
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta
from ares.gateway.pool.instance import Instance
from ares.gateway.service import Gateway
from ares.gateway.session.session import Session
from ares.gateway.tuning import DEFAULT, Tuning
from ares.mock_engine.request import Request
from tests.gateway.fakes import FakeInstance, expected, instances
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

PROMPT = [10, 20, 30, 40, 50]


def configuration(fakes: list[FakeInstance], **settings: Any) -> GatewayConfig:
    """Quiet by default: no policy interferes."""
    defaults: dict[str, Any] = {"preset": "off", "telemetry_interval_s": 0.02, "handover_timeout_s": 0.5}
    if "models" not in settings:
        defaults["model"] = "some/model"
    return GatewayConfig(workers=[fake.url for fake in fakes], **(defaults | settings))


async def started(gateway: Gateway) -> Gateway:
    await gateway.start()
    await eventually(lambda: all(i.health.healthy and i.state.hello for i in gateway.pool.instances), 15)
    return gateway


class Client:
    """Takes the tokens of one sequence."""

    def __init__(
        self, gateway: Gateway, maximum: int = 60, *, name: str = "request", prompt: list[int] = PROMPT, **sampling: Any
    ) -> None:
        self.tokens: list[int] = []
        self.prompt = prompt
        self._gateway = gateway
        self._name = name
        self.task = asyncio.create_task(gateway.generate(name, prompt, Sampling({}, maximum, **sampling), self._emit))

    async def _emit(self, batch: list[Delta]) -> bool:
        self.tokens += [token for delta in batch for token in delta.token_ids or []]
        return False

    async def reached(self, count: int) -> Session:
        await eventually(lambda: len(self.tokens) >= count or self.task.done())
        return self._gateway.sessions[self._name]

    async def finish(self) -> None:
        await asyncio.wait_for(self.task, 60)

    def check(self, maximum: int = 60) -> None:
        assert self.tokens == expected(self.prompt, maximum, vocabulary=VOCABULARY)


def find(gateway: Gateway, name: str) -> Instance:
    found = gateway.pool.find(name)
    assert found is not None
    return found


def view(gateway: Gateway, exclude: set[str] = frozenset()) -> ClusterSnapshot:  # type: ignore[assignment]
    return gateway.controller.snapshots.build(gateway.sessions.values(), exclude)


def other(gateway: Gateway, sequence: Session) -> Instance:
    return next(i for i in gateway.pool.decode_instances if i is not sequence.instance)


def sample(gateway: Gateway, name: str, **labels: str) -> float:
    return gateway.metrics.registry.get_sample_value(name, labels) or 0.0


def exactly(request: Request) -> tuple[float, float, float]:
    """A predictor that knows: every request here runs to its limit."""
    left = float(request.end - len(request.output))
    return left, left, left


@contextlib.asynccontextmanager
async def cluster(
    folder: Path, *, kv_blocks: int = 40, tuning: Tuning = DEFAULT, **settings: Any
) -> AsyncIterator[tuple[Gateway, Any]]:
    """One prefill and two decode instances of so many blocks of 16 tokens, under the preset `ares`."""
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes[1:]:
            fake.kv_blocks = kv_blocks
            fake.predicts = exactly
        for fake in fakes:
            await fake.die()
            await fake.start()
        gateway = Gateway(configuration(fakes, **({"preset": "ares", "period_s": 0.05} | settings)), folder, tuning)
        await started(gateway)
        yield gateway, fakes
        for fake in fakes:
            await fake.until(lambda fake=fake: fake.quiet)
        await gateway.stop()


def teach(gateway: Gateway, tokens: int) -> None:
    """Let the gateway believe that outputs have so many tokens."""
    for _ in range(100):
        gateway.controller.snapshots.lengths.add(tokens)


def hold(fakes: list[FakeInstance], tokens: int) -> None:
    """Let no decode instance generate further than so many tokens of prompt and output."""
    for fake in fakes[1:]:
        fake.hold_at = tokens


def stop_holding(fakes: list[FakeInstance]) -> None:
    for fake in fakes[1:]:
        fake.hold_at = None


async def finish(clients: Iterable[Client], tokens: int = 60) -> None:
    """Wait for the ends of requests, and check that each has every token of so many once."""
    for client in clients:
        await client.finish()
        client.check(tokens)
