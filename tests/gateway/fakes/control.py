"""The control channel of a fake: what it was told, answers that come late, wrong or not at all, and copies ahead."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from ares.engine.control import ControlChannel, EngineCommand, GatewayDisconnected
from ares.engine.expected_requests import ExpectedRequests
from ares.mock_engine import report
from ares.mock_engine.transfer import kv_transfer_params
from ares.protocol import messages
from ares.protocol.fields import FIRST_FORECAST, CutOutcome
from ares.protocol.keys import ControlKey

if TYPE_CHECKING:
    from tests.gateway.fakes.engine import SteeredInstance

BLOCK = 16


class _Announced(ExpectedRequests):
    """Keeps the keys of what is announced."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self._keys = keys

    def add(self, key: str, within_s: float, now: float) -> None:
        self._keys.append(key)
        super().add(key, within_s, now)


class SteeredChannel(ControlChannel):
    """The channel of one instance, from its start to its end."""

    def __init__(self, engine: "SteeredInstance", notify: Callable[[], None]) -> None:
        self._engine = engine
        self._fake = fake = engine.fake
        self._loop = asyncio.get_running_loop()
        self._steps = 0
        hello = report.hello(engine)
        hello = msgspec.structs.replace(
            hello,
            versions={"vllm": "fake"},
            token_bytes=1000.0,
            pull_within_step_bytes=1_000_000,
            prefix_caching=fake.prefix_caching,
            carries=list(fake.carries),
            leases=fake.leases,
            expects=True,
            step_tokens=fake.step_tokens,
            roles=hello.roles if fake.roles is None else fake.roles,
            configuration=dict(fake.configuration),
            max_num_seqs=0,
            max_num_batched_tokens=0,
        )
        key = ControlKey(fake.control_key) if fake.control_key is not None else None
        super().__init__(engine.control_address, hello, SteeredTelemetry(engine), notify=notify, key=key)
        self.expected = _Announced(fake.announced)

    @property
    def waiting(self) -> bool:
        """Whether commands wait for the engine, and it is not deaf to them."""
        return super().waiting and not self._fake.faults.deaf

    def commands(self) -> list[tuple[bytes, EngineCommand]]:
        """Take the commands that the mock engine is to carry out."""
        return [(sender, command) for sender, command in super().commands() if not self._carried_out(sender, command)]

    def post(self, event: messages.Event, receiver: bytes | None = None) -> None:
        """Send an event, where it is not lost; the result of a `Cut` or `Copy` perhaps late."""
        faults = self._fake.faults
        late_s = 0.0
        if isinstance(event, messages.CutResult) and event.kv_transfer_params and self._fake.forecast:
            known = {**event.kv_transfer_params, FIRST_FORECAST: self._fake.forecast}
            event = msgspec.structs.replace(event, kv_transfer_params=known)
        if isinstance(event, messages.CutResult | messages.CopyResult):
            if faults.lose_handover:
                return
            late_s = faults.handover_after_s
        if late_s:
            self._loop.call_later(late_s, super().post, event, receiver)
        else:
            super().post(event, receiver)

    def post_tokens(self, rows: Iterable[messages.NewTokens]) -> None:
        """Send the tokens of a step, where they are not lost."""
        self._steps += 1
        lost = self._fake.faults.lose_tokens
        if self._fake.faults.wrong_tokens:
            rows = [messages.NewTokens(row.key, row.position, [token ^ 1 for token in row.token_ids]) for row in rows]
        if not (lost and self._steps % lost == 0):
            super().post_tokens(rows)

    def _carried_out(self, sender: bytes, command: EngineCommand) -> bool:
        """Note a command; return whether nothing is left to do for the mock engine."""
        fake = self._fake
        match command:
            case messages.Cut(key=key):
                fake.cuts.append(key)
                if fake.faults.not_running and key in fake.running:
                    self.post(messages.CutResult(command.call, key, CutOutcome.NOT_RUNNING), sender)
                    return True
            case messages.Copy(key=key):
                fake.copies.append(key)
                self.post(self._copy(command), sender)
                return True
            case messages.Release(key=key):
                fake.released.append(key)
            case messages.Connect(peers=peers):
                fake.peers += peers
            case GatewayDisconnected(gateway=gateway):
                for key in [key for key in fake.pinned if messages.owner(key) == gateway]:
                    self._engine.pins.release(key)
                    fake.orphans.append(key)
        return False

    def _copy(self, command: messages.Copy) -> messages.CopyResult:
        """Pin the whole blocks of a running request, for a copy ahead of it."""
        request = self._fake.running.get(command.key)
        count = min(request.length - 1, command.most) // BLOCK * BLOCK if request is not None else 0
        if request is None or not count:
            return messages.CopyResult(command.call, command.pin)
        pin = self._fake.pin(command.pin, (request.prompt + request.output)[:count])
        transfer = kv_transfer_params(self._engine.identity, self._engine.boot, pin)
        return messages.CopyResult(command.call, command.pin, count, transfer)


class SteeredTelemetry:
    """The mock engine's telemetry, with the predictions, the step time and the pull speed that a test sets."""

    def __init__(self, engine: "SteeredInstance") -> None:
        self._engine = engine
        self._measure = report.TelemetrySource(engine)

    def __call__(self) -> messages.Telemetry | None:
        """Return the telemetry; None where nothing is sent."""
        measured, fake = self._measure(), self._engine.fake
        if measured is None:
            return None
        rows = measured.rows
        if fake.predicts is not None:
            running = fake.running
            rows = [
                msgspec.structs.replace(row, remaining=fake.predicts(running[row.key])) if row.key in running else row
                for row in rows
            ]
        # A step takes what it should, also on a machine that is too slow for it.
        return msgspec.structs.replace(
            measured,
            rows=rows,
            step_time_s=fake.step_s,
            busy_s=measured.steps * fake.step_s,
            pull_bytes_per_s=fake.pull_bytes_per_s,
            predictor=fake.predictor,
            predictor_refused=fake.predictor_refused,
        )
