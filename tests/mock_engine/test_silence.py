"""Instances that stop answering: stopped processes, and connections that carry nothing any more."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from ares.config import GatewayConfig
from ares.free_ports import free_ports
from ares.gateway.service import Gateway
from ares.gateway.tuning import Tuning
from ares.mock_engine import model as mock_model
from ares.mock_engine import report
from ares.mock_engine.serve import Server, identities
from ares.mock_engine.transfer import Puller
from ares.protocol import rpc
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.mock_engine.cluster import MODEL, settings
from tests.mock_engine.processes import gateway_over, generate, workers
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(240)


def prompt(number: int) -> list[int]:
    return [10 + number, *range(110, 160)]


# Waits for a quarter of what serves, in the same order.
QUARTER = Tuning(frozen_s=1.5, alive_s=1.2)


def quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let connections break after a quarter of what serves."""
    monkeypatch.setattr(rpc, "CONNECTION_TIMEOUT_S", 2.5)
    monkeypatch.setattr(rpc, "CONNECTION_HEARTBEAT_S", 0.5)


def busy(counters: dict[str, Any]) -> bool:
    return any(counters[name] for name in ("running", "waiting", "loading", "pinned", "kv_blocks_used"))


def hosted(gateway: Gateway, name: str) -> list[str]:
    """The requests that an instance is in the middle of."""
    return [s.id for s in gateway.sessions.values() if s.instance and s.instance.name == name and len(s.emitted) > 10]


async def test_a_stopped_instance_is_done_without_and_comes_back(model_folder: Path) -> None:  # noqa: F811
    model = mock_model.load(model_folder)
    with workers(model_folder, 2) as made:
        async with httpx.AsyncClient(timeout=60) as http, gateway_over(made, model_folder) as gateway:
            port = made.ports[0]
            stopped = gateway.pool.find(f"w{port}")

            async def counters() -> dict[str, Any]:
                return (await http.get(f"http://127.0.0.1:{port}/simulate/counters")).json()

            runs = [asyncio.create_task(generate(gateway, str(n), prompt(n), 200)) for n in range(6)]
            await eventually(lambda: bool(hosted(gateway, stopped.name)))
            os.kill(made.processes[port].pid, signal.SIGSTOP)
            try:
                assert hosted(gateway, stopped.name)
                outputs = await asyncio.gather(*runs)
            finally:
                os.kill(made.processes[port].pid, signal.SIGCONT)
            assert outputs == [model.continuation(prompt(n), 200) for n in range(6)]
            # It continues, has dropped the requests that others finished meanwhile, and takes new ones.
            await eventually(lambda: stopped.open)
            async with asyncio.timeout(60):
                while busy(left := await counters()):  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(0.05)
            again = await asyncio.gather(*(generate(gateway, f"again-{n}", prompt(n), 30) for n in range(6)))
            assert again == [model.continuation(prompt(n), 30) for n in range(6)]
            assert (await counters())["finished"] > left["finished"]


async def test_a_stopped_prefill_instance_is_done_without(
    model_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quarter(monkeypatch)
    model = mock_model.load(model_folder)
    with workers(model_folder, 3, prefill=1) as made:
        async with gateway_over(made, model_folder, QUARTER) as gateway:
            assert await generate(gateway, "before", prompt(0), 20) == model.continuation(prompt(0), 20)
            stopped = made.processes[made.ports[0]]
            os.kill(stopped.pid, signal.SIGSTOP)
            try:
                # Its telemetry is silent too; what was sent to it is abandoned, and decode instances prefill.
                outputs = await asyncio.gather(*(generate(gateway, str(n), prompt(n), 40) for n in range(4)))
            finally:
                os.kill(stopped.pid, signal.SIGCONT)
            assert outputs == [model.continuation(prompt(n), 40) for n in range(4)]
            await eventually(lambda: all(i.open for i in gateway.pool.instances))


class Link:
    """A gateway's way to one instance, that can fall silent: nothing arrives, no connection is closed."""

    def __init__(self, server: Server) -> None:
        self._identity = server.identity
        self._flows = asyncio.Event()
        self._flows.set()
        self._port = free_ports("127.0.0.1", 2)
        self._control_port = self._port + 1
        self._listeners: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def open(self) -> None:
        ways = ((self._port, self._identity.port), (self._control_port, self._identity.control_port))
        for here, there in ways:

            async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, there: int = there) -> None:
                their_reader, their_writer = await asyncio.open_connection("127.0.0.1", there)
                for way in ((reader, their_writer), (their_reader, writer)):
                    task = asyncio.create_task(self._carry(*way, self._flows))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

            self._listeners.append(await asyncio.start_server(connected, "127.0.0.1", here))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
        # The address of the control channel in its description must lead through here too; both ports have five digits.
        theirs, ours = (f"tcp://127.0.0.1:{n}".encode() for n in (self._identity.control_port, self._control_port))
        with contextlib.suppress(OSError):
            while True:
                data = await reader.read(1 << 16)
                await flows.wait()
                if not data:
                    break
                writer.write(data.replace(theirs, ours))
                await writer.drain()
        writer.close()

    def fall_silent(self) -> None:
        self._flows.clear()

    def heal(self) -> None:
        """Let everything that was delayed arrive."""
        self._flows.set()

    def forget(self) -> None:
        """Carry new connections only: those from before stay silent for ever, as behind a firewall that restarted."""
        self._flows = asyncio.Event()
        self._flows.set()

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for task in self._tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def linked(count: int, links: int) -> AsyncIterator[tuple[list[Server], list[Link]]]:
    """Serve so many instances, the first of them behind links."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as pulling:
        found = identities("both", "both", "127.0.0.1", free_ports("127.0.0.1", count), 0, count)
        servers = [Server(identity, settings(), MODEL, Puller(pulling)) for identity in found]
        made: list[Link] = []
        try:
            for server in servers:
                await server.start()
            for server in servers[:links]:
                made.append(Link(server))
                await made[-1].open()
            yield servers, made
        finally:
            for link in made:
                link.close()
            for server in servers:
                server.stop()


async def test_instances_behind_a_cut_are_done_without_and_come_back(
    model_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quarter(monkeypatch)
    async with linked(4, links=2) as (servers, links):
        urls = [link.url for link in links] + [server.url for server in servers[2:]]
        gateway = Gateway(GatewayConfig(model="some/model", workers=urls, preset="off"), model_folder, QUARTER)
        await gateway.start()

        def counters(number: int) -> dict[str, Any]:
            instance = servers[number].instance
            assert instance is not None
            return report.counters(instance)

        try:
            await eventually(lambda: all(i.open for i in gateway.pool.instances))
            cut = [gateway.pool.find(server.identity.name) for server in servers[:2]]
            runs = [asyncio.create_task(generate(gateway, str(n), prompt(n), 1500)) for n in range(8)]
            await eventually(lambda: all(hosted(gateway, i.name) for i in cut))
            for link in links:
                link.fall_silent()
            assert all(hosted(gateway, i.name) for i in cut)
            outputs = await asyncio.gather(*runs)
            assert outputs == [MODEL.continuation(prompt(n), 1500) for n in range(8)]
            links[0].heal()
            links[1].forget()
            await eventually(lambda: all(i.open for i in cut), 60)
            await eventually(lambda: not any(busy(counters(n)) for n in range(4)), 60)
            before = [counters(n)["finished"] for n in range(2)]
            again = await asyncio.gather(*(generate(gateway, f"again-{n}", prompt(n), 30) for n in range(8)))
            assert again == [MODEL.continuation(prompt(n), 30) for n in range(8)]
            assert all(counters(n)["finished"] > before[n] for n in range(2))
        finally:
            await gateway.stop()


async def test_what_runs_for_a_gateway_behind_a_cut_ends(
    model_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It resumed these requests elsewhere, and cannot send that: only the instance itself can end them (I2)."""
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 2.5)  # more than between two heartbeats
    monkeypatch.setattr(rpc, "GATEWAY_EXPIRY_S", 1.5)
    async with linked(2, links=1) as (servers, links):
        gateway = Gateway(
            GatewayConfig(model="some/model", workers=[links[0].url, servers[1].url], preset="off"),
            model_folder,
            Tuning(frozen_s=1.0, alive_s=0.8, silent_s=0.8),
        )
        await gateway.start()
        behind, other = (server.instance for server in servers)
        assert behind is not None
        assert other is not None
        try:
            await eventually(lambda: all(i.open for i in gateway.pool.instances))
            runs = [asyncio.create_task(generate(gateway, str(n), prompt(n), 4000)) for n in range(4)]
            await eventually(lambda: bool(hosted(gateway, behind.identity.name)))
            links[0].fall_silent()
            await eventually(lambda: len(hosted(gateway, other.identity.name)) == 4, 60)
            assert report.counters(behind)["running"] > 0
            await eventually(lambda: not report.counters(behind)["running"], 60)
            counters = report.counters(behind)
            assert counters["aborted"] == 0, "it was not the client that ended them"
            assert counters["pinned"] == counters["kv_blocks_used"] == 0
            assert not any(run.done() for run in runs)
            assert await asyncio.gather(*runs) == [MODEL.continuation(prompt(n), 4000) for n in range(4)]
        finally:
            await gateway.stop()


async def test_what_runs_for_a_gateway_that_is_only_forgotten_goes_on(
    model_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.5)  # less than between two heartbeats
    async with linked(1, links=0) as (servers, _):
        gateway = Gateway(GatewayConfig(model="some/model", workers=[servers[0].url], preset="off"), model_folder)
        await gateway.start()
        instance = servers[0].instance
        assert instance is not None
        try:
            await eventually(lambda: gateway.pool.instances[0].open)
            run = asyncio.create_task(generate(gateway, "stays", prompt(0), 1500))
            await eventually(lambda: gateway.name in instance.channel.disconnected)
            await eventually(lambda: gateway.name not in instance.channel.disconnected)
            assert not run.done()
            assert await run == MODEL.continuation(prompt(0), 1500)
            assert report.counters(instance)["arrived"] == 1
        finally:
            await gateway.stop()


async def test_whoever_reads_a_stream_that_was_ended_goes_on_elsewhere(
    model_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way of the commands is cut, that of the tokens is not: an output must not look complete that is not."""
    monkeypatch.setattr(rpc, "GATEWAY_EXPIRY_S", 0.5)
    async with linked(2, links=0) as (servers, _):
        gateway = Gateway(
            GatewayConfig(model="some/model", workers=[server.url for server in servers], preset="off"), model_folder
        )
        await gateway.start()
        try:
            await eventually(lambda: all(i.open for i in gateway.pool.instances))
            runs = [asyncio.create_task(generate(gateway, str(n), prompt(n), 1500)) for n in range(4)]
            cut = gateway.pool.find(servers[0].identity.name)
            instance = servers[0].instance
            assert instance is not None
            await eventually(lambda: bool(hosted(gateway, cut.name)))
            # The instance is as if it had not heard the gateway for long.
            instance.channel.disconnected[gateway.name] = 0.0
            assert await asyncio.gather(*runs) == [MODEL.continuation(prompt(n), 1500) for n in range(4)]
            counters = [report.counters(server.instance) for server in servers if server.instance is not None]
            assert sum(c["arrived"] for c in counters) > 4
            assert sum(c["aborted"] for c in counters) == 0
        finally:
            await gateway.stop()
