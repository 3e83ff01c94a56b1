"""A gateway over mock engines, served by a thread of its own: what is sent to it comes from another."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import uvicorn

from ares.config import GatewayConfig
from ares.free_ports import free_ports
from ares.gateway.http import app as application
from ares.gateway.http.connection import Connection, Limits
from ares.gateway.http.responses import DirectSend
from ares.gateway.service import Gateway
from ares.mock_engine import report
from ares.mock_engine.model import MockModel
from ares.mock_engine.serve import Server
from ares.mock_engine.settings import EngineSettings, Identity
from ares.mock_engine.transfer import Pulled, Puller, PullError
from ares.protocol.messages import Role
from ares.simulator.profile import Profile, StepTimeModel
from tests.gateway.conftest import VOCABULARY
from tests.gateway.fakes import FIRST_ORDINARY, free_port
from tests.waiting import eventually

MODEL = "some/model"
LONGEST = 96
"""Tokens of a prompt and its output: nobody generates for long."""
PATIENCE_S = 60.0
"""Nothing takes nearly as long, on however slow a machine."""
_SETTLE_S = 30.0
_IDLE_S = 1.0
_TRIES = 5
_TOKENS = MockModel(tuple(range(FIRST_ORDINARY, VOCABULARY)), 2, VOCABULARY, mean_output=12.0)
_PROFILE = Profile(
    name="fuzz",
    model="fuzz",
    source="made up",
    kv_tokens=1 << 15,
    kv_bytes_per_token=1000,
    latency_s=0.0,
    step=StepTimeModel(base_s=0.0005, per_request_s=0, per_resident_token_s=1e-9, per_prefill_token_s=0),
)
_BUSY = ("running", "waiting", "loading", "pinned", "kv_blocks_used")
T = TypeVar("T")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Nearby(Puller):
    """Pulls from no address that a test has made up."""

    async def pull(
        self, source: dict[str, Any], expected_s: float, *, discard: bool = False, cached: int = 0
    ) -> Pulled:
        """Pull KV; PullError where it is elsewhere."""
        _check_near(source)
        return await super().pull(source, expected_s, discard=discard, cached=cached)

    async def extend(self, source: dict[str, Any], request_ids: list[str]) -> None:
        """Renew leases; PullError where they are elsewhere."""
        _check_near(source)
        await super().extend(source, request_ids)


def _check_near(source: dict[str, Any]) -> None:
    if source["remote_host"] != "127.0.0.1" or 1 < source["remote_port"] < 1 << 16:
        raise PullError("elsewhere")


class Reply:
    """What came back, read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def events(self) -> list[bytes]:
        """The data of the events of a stream."""
        assert self.body.endswith(b"\n\n"), self.body
        lines = self.body.removesuffix(b"\n\n").split(b"\n\n")
        data = [line.partition(b"\ndata: ")[2] if line.startswith(b"event: ") else line[6:] for line in lines]
        assert all(line.startswith((b"data: ", b"event: ")) for line in lines), lines
        return data

    def check(self) -> None:
        """Check what holds for whatever was asked."""
        kind = self.headers.get_content_type()
        if self.status == 503:
            # The operator is told which target is not there; clients, when to come again.
            assert self.headers["retry-after"] or b'"target_unavailable"' in self.body
        assert self.status < 500 or self.status == 503, (self.status, self.body)
        if kind == "text/event-stream":
            assert self.status == 200
            *events, last = self.events
            ended = b"[DONE]", b'{"type":"message_stop"', b'{"type":"response.', b'{"type":"error"'
            assert last.startswith(ended), last
            for event in map(json.loads, events if last == b"[DONE]" else [*events, last]):
                assert event.get("type") != "response.failed", event
                if "error" in event:
                    _check_error(event)
                    assert event["error"]["type"] != "server_error", event
        elif self.status >= 400 and self.body:
            assert kind == "application/json"
            _check_error(json.loads(self.body))
        elif kind == "application/json" and self.body:  # none after HEAD
            json.loads(self.body, parse_constant=_refuse)


def _check_error(body: Any) -> None:
    if body.get("type") == "error":  # Anthropic's form
        assert set(body) == {"type", "error"}, body
        assert set(body["error"]) == {"type", "message"}, body
        assert body["error"]["message"], body
        return
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"], body
    assert isinstance(body["error"]["message"], str)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


class Service:
    """One gateway over a prefill and two decode instances, and an instance that belongs to nobody.

    Attributes
    ----------
    port, stray_port, stray_control
        Where the gateway answers, the instance of nobody, and that one's control channel.
    schema
        The gateway's OpenAPI document.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.stray_port = self.stray_control = 0
        self.schema: dict[str, Any] = {}
        self._folder = folder
        self._started = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator["Service"]:
        """Serve."""
        self._thread.start()
        assert self._started.wait(PATIENCE_S)
        assert self._thread.is_alive()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        settings = EngineSettings(_PROFILE, MODEL, _PROFILE.kv_tokens // _PROFILE.block_size, LONGEST)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as pulling:
            for _ in range(_TRIES):
                with contextlib.suppress(OSError):  # somebody else was quicker to take a port
                    await self._start_engines(settings, pulling)
                    break
            stray = self._engines[-1].identity
            self.stray_port, self.stray_control = stray.port, stray.control_port
            try:
                await self._serve_gateway([engine.url for engine in self._engines[:3]])
            finally:
                for engine in self._engines:
                    engine.stop()

    async def _start_engines(self, settings: EngineSettings, pulling: aiohttp.ClientSession) -> None:
        roles: list[tuple[str, Role]] = [
            ("prefill-0", "prefill"),
            ("decode-0", "decode"),
            ("decode-1", "decode"),
            ("stray", "both"),
        ]
        port = free_ports("127.0.0.1", 2 * len(roles))
        self._engines = []
        try:
            for n, (name, role) in enumerate(roles):
                one = Identity(name, role, "127.0.0.1", port + n, port + len(roles) + n)
                puller = _Nearby(pulling) if name == "stray" else Puller(pulling)
                engine = Server(one, settings, _TOKENS, puller)
                await engine.start()
                self._engines.append(engine)
        except OSError:
            for engine in self._engines:
                engine.stop()
            raise

    async def _serve_gateway(self, workers: list[str]) -> None:
        config = GatewayConfig(
            model=MODEL,
            workers=workers,
            preset="ares",
            period_s=0.1,
            telemetry_interval_s=0.05,
            maximum_waiting=256,
            max_body_bytes=1 << 18,
            idle_timeout_s=_IDLE_S,
        )
        app = application.build(config, self._folder)
        self.schema = app.openapi()
        self.gateway: Gateway = app.state.gateway
        limits = Limits(config.max_head_bytes, config.idle_timeout_s, config.unread_timeout_s)
        http: Any = partial(Connection, limits)
        server = _Server(
            uvicorn.Config(
                DirectSend(app), port=self.port, http=http, ws="none", log_config=None, timeout_graceful_shutdown=1
            )
        )
        task = asyncio.create_task(server.serve())
        await eventually(lambda: server.started, PATIENCE_S)
        await eventually(
            lambda: all(i.health.healthy and i.state.hello for i in self.gateway.pool.instances), PATIENCE_S
        )
        self._started.set()
        await self._ended.wait()
        server.should_exit = True
        await task

    # --- clients ---

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        port: int | None = None,
    ) -> Reply:
        """Send one request and read its reply; TimeoutError where it hangs."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE_S)
        try:
            connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def post(self, path: str, body: str | bytes) -> Reply:
        """Send a JSON body."""
        data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        return self.send("POST", path, data, {"Content-Type": "application/json"})

    def raw(self, data: bytes, port: int | None = None, silence_s: float = 0.03) -> bytes:
        """Send bytes, return what comes until nothing has for a moment, and hang up."""
        received = b""
        client = socket.create_connection(("127.0.0.1", port or self.port), timeout=PATIENCE_S)
        with client, contextlib.suppress(ConnectionError, TimeoutError):
            client.sendall(data)
            client.settimeout(silence_s)
            while len(received) < 1 << 22 and (part := client.recv(1 << 16)):
                received += part
        return received

    # --- what must be true afterwards ---

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def completes(self) -> None:
        """Check that a completion comes out right."""
        prompt = [10, 20, 30]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
        reply = self.post("/v1/completions", json.dumps(body))
        assert reply.status == 200, reply.body
        assert json.loads(reply.body)["choices"][0]["token_ids"] == _TOKENS.continuation(prompt, 20)

    def footprint(self) -> dict[str, int]:
        """Return what a leak would let grow, once everything has come to rest."""
        before: dict[str, int] = {}
        while True:
            tasks, idle = self.call(self._rest())
            now = {"tasks": tasks, "sockets": _sockets() - idle}
            if now == before:  # nothing was closed between the two counts
                return now
            before = now
            time.sleep(0.02)

    async def _rest(self) -> tuple[int, int]:
        """Return the tasks, and the ends of connections that are kept for the next request."""
        await eventually(self._still, _SETTLE_S)
        # Both ends are here: the gateway's, and the engine's.
        return len(asyncio.all_tasks()), 2 * sum(len(engine.connections) for engine in self._engines)

    def _still(self) -> bool:
        """Whether nothing runs, waits, or is held for anybody."""
        for engine in self._engines:
            assert engine.instance is not None
            counters = report.counters(engine.instance)
            if any(counters[name] for name in _BUSY):
                return False
            assert counters["arrived"] == counters["finished"] + counters["aborted"], counters
            ended = counters["pins_pulled"] + counters["pins_released"] + counters["pins_expired"]
            assert counters["pins_made"] == ended, counters
        gateway = self.gateway
        return not (gateway.sessions or gateway.controller.waiting or gateway.controller.suspended)


def _sockets() -> int:
    found = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found += str(file.readlink()).startswith("socket:")
    return found


def settled(service: Service, before: dict[str, int]) -> None:
    """Wait until a service uses no more than before."""
    deadline = time.monotonic() + _SETTLE_S
    while any((now := service.footprint())[name] > before[name] for name in before):
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.02)
