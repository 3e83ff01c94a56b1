"""The control channel, both ends: whatever arrives is taken or dropped, and nobody stops listening."""

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import example
from hypothesis import strategies as st

from ares.config import GatewayConfig
from ares.engine.drain import OwnControlChannel
from ares.gateway.http import app as application
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.service import Gateway
from ares.gateway.session.phase import Phase
from ares.gateway.session.session import InstanceSelector, Session
from ares.gateway.tuning import Tuning
from ares.policy import PRESETS, choose_instance, decide_admissions, decide_moves
from ares.policy.oom_avoidance import OomAvoidanceSettings, avoid_oom
from ares.protocol import messages, rpc
from tests.fuzz.cases import fuzz, noise
from tests.fuzz.service import PATIENCE_S, Service
from tests.gateway.fakes import instances
from tests.waiting import eventually

PEER = messages.Peer("e", "127.0.0.1", 5600)
COMMANDS = [
    messages.Subscribe(0.5),
    messages.Connect([PEER]),
    messages.Cut(1, "key"),
    messages.Copy(2, "key", "pin", 100),
    messages.Release("key"),
    messages.Expect("key", 2.0),
    messages.Drain(False),
    messages.Drain(True, 60.0),
    messages.Lease(3, "gateway", 5.0),
]
ROWS = [messages.Row(f"key-{n}", 40, 5, "running", (1.0, 5.0, 50.0)) for n in range(4)]
EVENTS = [
    messages.Hello("decode-0", "decode", "boot", PEER, 16, 100, 4096, {"vllm": "0"}, 1000.0, 1, True, ["seed"]),
    messages.Telemetry(1, 10, 4, 0, 0, 0.02, 100, 0, ROWS, 2.0, 1e9),
    messages.Telemetry(2, 10, 4, 0, 0, 0.02, 200, 0, ROWS, 4.5, 1e9),
    messages.Telemetry(3, 10, 4, 0, 0, 0.02, 300, 0, ROWS, 7.0, 1e9, True, {"scheduler.pins": 1}, 12.5),
    messages.KvReceived("key", 10, False, 0.1),
    messages.Predicted("key", (1.0, 2.0, 3.0)),
    messages.CutResult(1, "key", "pinned", 3, [1, 2, 3], {"remote_num_tokens": 9}),
    messages.CopyResult(2, "pin", 16, {"remote_num_tokens": 9}),
    messages.LeaseResult(3, "gateway", True),
    messages.StepTokens([messages.NewTokens("key", 7, [1, 2]), messages.NewTokens("other", 0, [3])]),
]
_HEAD = msgspec.msgpack.encode({"type": "cut", "call": 1, "key": "k"})[1:]
# A field that nobody knows, nested without end; and text that is not UTF-8.
DEEP = b"\x84" + _HEAD + b"\xa1x" + b"\x91" * 100_000 + b"\xc0"
NO_TEXT = msgspec.msgpack.encode({"type": "release", "key": "kk"}).replace(b"kk", b"\xff\xff")
NOT_UTF8 = msgspec.msgpack.encode({"type": "predicted", "key": "kk", "remaining": [1, 2, 3]}).replace(
    b"kk", b"\xff\xff"
)
DEEP_EVENT = (
    b"\x83" + msgspec.msgpack.encode({"type": "copied", "call": 1})[1:] + b"\xa1x" + b"\x91" * 100_000 + b"\xc0"
)

_numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, 1e308, 5e-324]),
)
_words = st.sampled_from(["", "key", "key-0", "x" * 3000, "\x00", "decode", "pinned", "running"]) | st.text(max_size=9)


@st.composite
def extreme(draw: st.DrawFn, *messages: Any) -> bytes:
    """Draw a message with some of its fields replaced by what may well have the right type."""
    plain = msgspec.to_builtins(draw(st.sampled_from(messages)))
    for name in draw(st.lists(st.sampled_from(sorted(plain)), max_size=3)):
        plain[name] = draw(_replacement(plain[name]))
    return msgspec.msgpack.encode(plain)


def _replacement(value: Any) -> st.SearchStrategy[Any]:
    other = _numbers | _words | st.none() | st.just([]) | st.just({})
    if isinstance(value, bool | str):
        return other | st.booleans()
    if isinstance(value, int | float):
        return _numbers | _numbers | other
    if isinstance(value, dict):
        return st.dictionaries(_words, other, max_size=3) | st.fixed_dictionaries(dict.fromkeys(value, other))
    if value and isinstance(value[0], list | tuple):  # rows of telemetry
        keys = st.sampled_from([f"key-{n}" for n in range(4)]) | _words
        states = st.sampled_from(["running", "waiting", "loading", "copying", "nonsense"])
        amounts = st.integers(0, 5000) | _numbers
        quantiles = st.tuples(_numbers, _numbers, _numbers) | st.tuples(*[st.floats(0, 1e4)] * 3) | st.none()
        return st.lists(st.tuples(keys, amounts, amounts, states, quantiles), max_size=6)
    return st.lists(other, max_size=4)


def any_message(*valid: Any) -> st.SearchStrategy[bytes]:
    return noise(*map(rpc.encode, valid)) | extreme(*valid) | extreme(*valid)


@fuzz("wire: any bytes, read as command and event", 400, body=any_message(*COMMANDS, *EVENTS))
@example(body=DEEP)
@example(body=NO_TEXT)
@example(body=DEEP_EVENT)
@example(body=NOT_UTF8)
def test_what_is_read_is_said_again_or_refused(body: bytes) -> None:
    for decode in (rpc.decode_command, rpc.decode_event):
        try:
            message = decode(body)
        except msgspec.DecodeError as error:
            _said_why(error)
        else:
            assert rpc.encode(decode(rpc.encode(message))) == rpc.encode(message)


def _said_why(error: Exception) -> None:
    assert str(error)


# --- an instance ---


@pytest.fixture
def dealer(service: Service) -> Iterator["zmq.Socket[bytes]"]:
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{service.stray_control}")
        yield socket
        socket.send(rpc.encode(messages.Drain(draining=False)))


_calls = itertools.count(1 << 40)


def answers(dealer: "zmq.Socket[bytes]") -> None:
    """Check that the instance carries commands out."""
    call = next(_calls)
    dealer.send(rpc.encode(messages.Cut(call, "nobody")))
    while dealer.poll(int(PATIENCE_S * 1000)):
        event = rpc.decode_event(dealer.recv())
        if isinstance(event, messages.CutResult) and event.call == call:
            assert event.outcome == "unknown"
            return
    raise AssertionError("no answer")


_frames = st.lists(any_message(*COMMANDS), min_size=1, max_size=3)


@fuzz("wire: messages to an instance", 60, said=st.lists(_frames, min_size=1, max_size=12))
@example(said=[[DEEP], [NO_TEXT], [b""], [b"", b""], [rpc.encode(messages.Subscribe(math.inf))]])
@example(said=[[rpc.encode(messages.Subscribe(math.nan))], [rpc.encode(messages.Subscribe(-1.0))]])
def test_an_instance_listens_on(dealer: "zmq.Socket[bytes]", said: list[list[bytes]]) -> None:
    for frames in said:
        dealer.send_multipart(frames)
    answers(dealer)


# --- a gateway ---


class Decoding(Session):
    """A session that decodes where nothing answers, under a key that messages name."""

    def __init__(self, selector: InstanceSelector, number: int, instance: Instance) -> None:
        super().__init__(f"r{number}", [3] * 30, Sampling({}, 1000), selector, 10.0)
        self._where, self._name = instance, f"key-{number}"
        self.phase = Phase.DECODE
        self.output.first_token_at = self.arrived_at

    @property
    def instance(self) -> Instance:
        """Where it decodes."""
        return self._where

    @property
    def key(self) -> str:
        """Its name on that instance."""
        return self._name

    @property
    def waits(self) -> bool:
        """It does not wait outside decode."""
        return False

    def unmovable_now(self) -> str | None:
        """Return nothing: it can be moved, but where it goes ahead of a hand-over."""
        return "moving" if self.moving else None


class Bench:
    """A gateway whose instances are not there, but are heard; on a loop that runs while something is asked of it."""

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
        config = GatewayConfig(model="some/model", workers=urls, preset="off", period_s=1e6)
        self.runner = runner
        self.app = application.build(config, folder)
        self.gateway: Gateway = self.app.state.gateway

    @property
    def heard(self) -> list[Instance]:
        return self.gateway.pool.instances

    async def start(self) -> None:
        await self.gateway.start()
        for number in range(4):
            sequence = Decoding(self.gateway.controller, number, self.heard[number % 3])
            self.gateway.sessions[sequence.id] = sequence
        # Enough for a law of the step time, which most decisions ask for.
        steady = [msgspec.structs.replace(EVENTS[1], steps=100 * n, busy_s=2.5 * n) for n in range(1, 30)]
        await self.hear([(n, rpc.encode(event)) for n in range(3) for event in (EVENTS[0], *steady)])

    async def hear(self, said: list[tuple[int, bytes]]) -> None:
        for number, body in said:
            await self.heard[number].receive(body, self.gateway.pool.connect_peers)

    def decide(self) -> None:
        """Let every preset decide on what was heard, and check that it can be carried out."""
        gateway, snapshots = self.gateway, self.gateway.controller.snapshots
        sequences = list(gateway.sessions.values())
        view = snapshots.build(sequences[:3])
        candidates = snapshots.candidates(sequences[3:], view.cluster, [set()] * len(sequences[3:]))
        count, rows = len(view.instances), len(view.sessions)
        remaining = view.cluster.remaining_tokens
        assert remaining is not None
        assert np.isfinite(remaining).all()
        assert (np.diff(remaining, axis=1) >= 0).all()
        for preset in PRESETS.values():
            dispatch, admission, rebalance, *_ = preset.make()
            if admission.queues_requests:  # what it decides can be carried out, or it raises
                decide_admissions(admission, view.cluster, candidates, view.running)
            for one in avoid_oom(view.cluster, OomAvoidanceSettings(), view.running):
                assert 0 <= one.request < rows
                assert -1 <= one.target < count
            decide_moves(rebalance, view.cluster)
            for known in (None, remaining[:1].ravel() if rows else None):
                choose_instance(dispatch, view.cluster, 30, known)
        gateway.scores.record(
            sequences, {row.key: row for i in self.heard if i.state.telemetry for row in i.state.telemetry.rows}
        )

    async def show(self) -> None:
        """Check that everybody who looks is answered."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for path in ("/metrics", "/version", "/v1/models", "/admin/v1/status"):
                reply = await client.get(path)
                assert reply.status_code == 200, (path, reply.text)
        json.loads(reply.text, parse_constant=_refuse)
        self.app.state.feed._make()


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def bench(model_folder: Path) -> Iterator[Bench]:
    with asyncio.Runner() as runner:
        made = Bench(model_folder, runner)
        runner.run(made.start())
        yield made
        made.gateway.sessions.clear()
        runner.run(made.gateway.stop())


_said = st.lists(st.tuples(st.integers(0, 2), any_message(*EVENTS)), min_size=1, max_size=10)
_huge = [messages.Row(f"key-{n}", 40, 5, "running", (1e308, 1e308, 1e308)) for n in range(4)]


@fuzz("wire: messages to a gateway, and decisions on them", 60, said=_said)
@example(said=[(0, DEEP_EVENT), (1, NOT_UTF8)])
@example(
    said=[(n, rpc.encode(e)) for n in range(3) for e in (EVENTS[0], msgspec.structs.replace(EVENTS[1], rows=_huge))]
)
@example(said=[(0, rpc.encode(msgspec.structs.replace(EVENTS[0], kv_blocks=0))), (0, rpc.encode(EVENTS[1]))])
def test_a_gateway_decides_on_whatever_it_hears(bench: Bench, said: list[tuple[int, bytes]]) -> None:
    bench.runner.run(bench.hear(said))
    bench.decide()
    bench.runner.run(bench.show())


@pytest.fixture
async def fake() -> AsyncIterator[Any]:
    async with instances("decode") as started:
        yield started[0]


# Of requests that nobody has, with a position that none can be at, and cut off.
STEPS = (rpc.encode(EVENTS[-1]), rpc.encode(messages.StepTokens([messages.NewTokens("key", -1, [])])))
UNHEARD = (DEEP_EVENT, NOT_UTF8, b"", b"\xc1", rpc.encode(COMMANDS[0]), *STEPS, STEPS[0][:-1])


@pytest.mark.parametrize("body", UNHEARD, ids=range(len(UNHEARD)))
async def test_a_gateway_listens_on(fake: Any, body: bytes) -> None:
    async with http_client() as http:
        pool = Pool([fake.url], http, 0.02)
        pool.start()
        (heard,) = pool.instances
        await eventually(lambda: heard.health.healthy)
        fake.engine.channel.send(body)
        fake.post(messages.Predicted("after it", (1.0, 2.0, 3.0)))
        await eventually(lambda: heard.control.prediction("after it") is not None)
        await pool.stop()


async def test_a_message_that_is_too_large_is_not_heard_and_costs_a_connection(fake: Any) -> None:
    async with http_client() as http:
        pool = Pool([fake.url], http, 0.02)
        pool.start()
        (heard,) = pool.instances
        await eventually(lambda: heard.health.healthy)
        hello = heard.state.hello
        assert hello is not None
        # But for its size it would be taken.
        large = msgspec.structs.replace(hello, versions={"vllm": "x" * (5 << 20)})
        fake.engine.channel.send(rpc.encode(large))

        def heard_again() -> bool:
            fake.post(messages.Predicted("after it", (1.0, 2.0, 3.0)))
            return heard.control.prediction("after it") is not None and heard.health.healthy

        await eventually(heard_again)
        assert heard.state.hello == hello
        # What nearly has that size is taken.
        fits = msgspec.structs.replace(hello, versions={"vllm": "x" * ((4 << 20) - 4096)})
        fake.engine.channel.send(rpc.encode(fits))
        await eventually(lambda: heard.state.hello == fits)
        await pool.stop()


@pytest.mark.parametrize("body", [DEEP_EVENT, NOT_UTF8, b""], ids=range(3))
async def test_the_process_that_serves_an_instance_listens_on(fake: Any, body: bytes) -> None:
    own = OwnControlChannel(fake.control_address, None)
    following = asyncio.create_task(own.follow())
    await eventually(lambda: own.telemetry is not None)
    before = own.telemetry
    assert before is not None
    fake.engine.channel.send(body)
    await eventually(lambda: own.telemetry is not None and own.telemetry.sequence > before.sequence + 1)
    following.cancel()


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://127.0.0.1:99999", "tcp://127.0.0.1", "ipc://"])
async def test_an_instance_that_says_nonsense_of_itself_is_asked_again(fake: Any, address: str) -> None:
    right, fake.control_address = fake.control_address, address
    async with http_client() as http:
        pool = Pool([fake.url], http, 0.02, tuning=Tuning(reconnect_s=0.01))
        pool.start()
        (heard,) = pool.instances
        await eventually(lambda: heard.name == fake.name)
        fake.control_address = right
        await eventually(lambda: heard.health.healthy)
        await pool.stop()
