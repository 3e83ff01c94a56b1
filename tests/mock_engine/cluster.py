"""Mock instances in this process, a pool of the gateway that watches them, and sessions over them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from ares.free_ports import free_ports
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool import instance as gateway
from ares.gateway.pool.delta import Delta
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.pool import Pool
from ares.gateway.session.placement import Placement
from ares.gateway.session.session import Session
from ares.mock_engine import report
from ares.mock_engine.instance import Instance
from ares.mock_engine.model import MockModel
from ares.mock_engine.serve import Server, identities
from ares.mock_engine.settings import EngineSettings
from ares.mock_engine.transfer import Puller
from ares.protocol.keys import ControlKey
from ares.protocol.messages import Role
from ares.simulator.profile import Profile, StepTimeModel
from tests.waiting import eventually

STOP = 2
MODEL = MockModel(ids=tuple(range(100, 300)), stop=STOP, vocabulary=1000)
PROMPT = list(range(3, 43))
# Fast steps, and transfers that take their time.
PROFILE = Profile(
    name="test",
    model="test",
    source="made up",
    kv_tokens=1 << 20,
    kv_bytes_per_token=1000,
    max_num_batched_tokens=512,
    step=StepTimeModel(base_s=0.003, per_request_s=0, per_resident_token_s=0, per_prefill_token_s=0),
)


def settings(kv_tokens: int = 1 << 16, **changes: Any) -> EngineSettings:
    """Behaviour for tests; `changes` to it or to the profile."""
    own = {name: changes.pop(name) for name in list(changes) if name in EngineSettings.__dataclass_fields__}
    profile = PROFILE.model_copy(update=changes)
    most = min(kv_tokens, 1 << 14)
    return EngineSettings(profile, "some/model", kv_tokens // profile.block_size, most, **own)


class Run:
    """A session that runs, and its output."""

    def __init__(self, cluster: "Cluster", sampling: Sampling, prompt: list[int]) -> None:
        self.tokens: list[int] = []
        self.reasons: list[str] = []
        self.session = Session("request", prompt, sampling, cluster, 10.0)
        self._cluster = cluster
        self.task = asyncio.create_task(self.session.run(self._emit))

    async def _emit(self, batch: list[Delta]) -> bool:
        for delta in batch:
            self.tokens += delta.token_ids or []
            if delta.finish_reason is not None:
                self.reasons.append(delta.finish_reason)
        return False

    async def reached(self, count: int) -> None:
        await eventually(lambda: len(self.tokens) >= count or self.task.done())

    async def move(self, target: str) -> str:
        """Move to `target` and return the outcome."""
        return (await self.session.hand_over(self._cluster.known(target), "test")).outcome

    async def finish(self) -> list[int]:
        await asyncio.wait_for(self.task, 60)
        return self.tokens


class Cluster:
    """The servers, the pool that watches them, and the placement of sessions: by `order`."""

    def __init__(self, servers: list[Server], pool: Pool) -> None:
        self.servers = {server.identity.name: server for server in servers}
        self.pool = pool
        self.order = [name for name, server in self.servers.items() if server.identity.role != "prefill"]

    def choose_prefill(self, _: Placement, __: gateway.Instance | None) -> gateway.Instance | None:
        return next((i for i in self.pool.instances if i.role == "prefill" and i.open), None)

    def decode_began(self, *_: object) -> None:
        """Nothing follows from it."""

    def prefill_ended(self, *_: object) -> None:
        """Nothing follows from it."""

    async def admit(self, session: Session, exclude: set[str]) -> gateway.Instance:
        chosen: list[gateway.Instance] = []

        def found() -> bool:
            usable = {i.name: i for i in self.pool.decode_instances if i.open and i.name not in exclude}
            chosen[:] = [usable[name] for name in self.order if name in usable]
            return bool(chosen)

        await eventually(found)
        return chosen[0]

    def known(self, name: str) -> gateway.Instance:
        found = self.pool.find(name)
        assert found is not None
        return found

    def instance(self, name: str) -> Instance:
        found = self.servers[name].instance
        assert found is not None
        return found

    def counters(self, name: str) -> dict[str, Any]:
        return report.counters(self.instance(name))

    def run(self, maximum: int, *, prompt: list[int] = PROMPT, **parameters: Any) -> Run:
        return Run(self, Sampling({"ignore_eos": True, **parameters}, maximum), prompt)

    async def at_rest(self) -> None:
        """Wait until nothing runs, waits or is pinned anywhere, and check that every pin ended once (I5)."""
        names = [name for name, server in self.servers.items() if server.instance is not None]
        await eventually(lambda: all(not self._busy(self.counters(name)) for name in names))
        for name in names:
            c = self.counters(name)
            assert c["arrived"] == c["finished"] + c["aborted"], c
            assert c["pins_made"] == c["pins_pulled"] + c["pins_released"] + c["pins_expired"], c

    def _busy(self, counters: dict[str, Any]) -> bool:
        return any(counters[name] for name in ("running", "waiting", "loading", "pinned", "kv_blocks_used"))


@contextlib.asynccontextmanager
async def serving(
    behaviour: EngineSettings, *roles: Role, model: MockModel = MODEL, control_key: ControlKey | None = None
) -> AsyncIterator[Cluster]:
    """Serve one instance a role, named after role and number, with a pool that knows all of them."""
    http = http_client()
    pulling = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
    found = []
    for role in dict.fromkeys(roles):
        count = roles.count(role)
        port = free_ports("127.0.0.1", count, [i.port for i in found])
        found += identities(role if count > 1 else f"{role}-0", role, "127.0.0.1", port, 0, count)
    servers = [Server(identity, behaviour, model, Puller(pulling)) for identity in found]
    pool = Pool([server.url for server in servers], http, 0.02, control_key)
    try:
        for server in servers:
            await server.start()
        pool.start()
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in pool.instances))
        yield Cluster(servers, pool)
    finally:
        await pool.stop()
        for server in servers:
            server.stop()
        await http.close()
        await pulling.close()
