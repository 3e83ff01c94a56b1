"""The mock engine behind a fake: a token comes when a test lets it, and a pull can fail."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from ares.engine.control import ControlChannel
from ares.mock_engine import api
from ares.mock_engine.batch import Batch, Step
from ares.mock_engine.http import Connection
from ares.mock_engine.instance import Instance
from ares.mock_engine.model import fold
from ares.mock_engine.pins import Pin, Pins
from ares.mock_engine.request import Request
from ares.mock_engine.settings import EngineSettings, Identity
from ares.mock_engine.transfer import Pulled, Puller, PullError
from ares.protocol import messages
from ares.protocol.fields import KV_TRANSFER_PARAMS, PROMPT_SHORTENED, REPETITION_DETECTED
from ares.simulator.profile import Profile, StepTimeModel
from tests.gateway.fakes.control import BLOCK, SteeredChannel

if TYPE_CHECKING:
    from tests.gateway.fakes.instance import FakeInstance

MODEL = "some/model"
# No lease ends within a test.
_LEASE_S = 3600.0


def settings(fake: "FakeInstance") -> EngineSettings:
    """Return the settings of a fake's engine: a step takes as long as its fake says, a pull no time."""
    profile = Profile(
        name="fake",
        model="fake",
        source="made up",
        kv_tokens=fake.kv_blocks * BLOCK,
        kv_bytes_per_token=1,
        block_size=BLOCK,
        max_num_seqs=1 << 16,
        max_num_batched_tokens=1 << 20,
        latency_s=0.0,
        step=StepTimeModel(base_s=1e-3, per_request_s=0, per_resident_token_s=0, per_prefill_token_s=0),
    )
    return EngineSettings(profile, MODEL, fake.kv_blocks, fake.max_model_len, prediction_error=None, lease_s=_LEASE_S)


class SteeredInstance(Instance):
    """One life of a fake: a mock engine that notes what comes, and steps as the fake is steered."""

    def __init__(self, fake: "FakeInstance", identity: Identity, puller: Puller) -> None:
        self.fake = fake
        super().__init__(identity, settings(fake), fake.model, puller)
        self.pins = NotedPins(_LEASE_S, self.pins.free)
        self.pins.freed = fake.freed

    def make_batch(self, pull: Callable[[Request], None]) -> Batch:
        """Return a batch that is steered."""
        return SteeredBatch(self, pull)

    def open_channel(self, notify: Callable[[], None]) -> ControlChannel:
        """Open a channel that notes what it is told."""
        return SteeredChannel(self, notify)

    def add(self, body: bytes, connection: Connection) -> None:
        """Take a request, which ends where the fake says."""
        super().add(body, connection)
        request, fake = connection.work, self.fake
        sampling = msgspec.json.decode(body)["sampling_params"]
        if fake.eos_at is not None and fake.eos_at >= request.length and not sampling.get("ignore_eos"):
            request.natural_end = fake.eos_at - request.length + 1
            request.check_from = min(request.check_from, request.natural_end)
        if request.source is not None:
            fake.pulled.append(request.key)
        if request.remote_decode and fake.foretells:
            self.channel.post(messages.Predicted(request.key, (1.0, float(request.length), 1000.0), fake.forecast))

    def finish(self, request: Request, reason: str, stop: int | str | None) -> None:
        """End a request, of a repetition where the test wants it: for the reason of the cut's limit, as vLLM does."""
        goes_on = reason == "length" and (request.remote_decode or request.cut is not None)
        if goes_on and self.fake.faults.repeats:
            request.unwanted, stop = True, REPETITION_DETECTED
        if request.remote_decode and self.fake.faults.shortens_prompts:
            # The KV is pinned whatever the token is.
            _mark_shortened(request.connection, reason)
            reason = "length"
        super().finish(request, reason, stop)


def _mark_shortened(connection: Connection, reason: str) -> None:
    """Let the reply say that its prefill has not computed the whole prompt, and give its own finish reason."""
    stock = connection.reply

    def reply(body: dict[str, Any]) -> None:
        body[KV_TRANSFER_PARAMS][PROMPT_SHORTENED] = True
        body["choices"][0]["finish_reason"] = reason
        stock(body)

    connection.reply = reply  # type: ignore[method-assign]


class SteeredBatch(Batch):
    """The batch of a fake's engine: who is preempted, who gets a token, and how long a step takes."""

    def __init__(self, engine: SteeredInstance, pull: Callable[[Request], None]) -> None:
        super().__init__(engine.settings.profile, engine.settings.kv_blocks, engine.settings.policy, pull)
        self._engine = engine
        self._fake = engine.fake

    def schedule(self) -> Step | None:
        """Plan the next step, without those that the test has preempted."""
        for request in list(self.running):
            if self._fake.faults.abort:
                self._abort(request)
            elif request.key in self._fake.preempted:
                self.preempt(request)
        kept_back = [request for request in self.waiting if request.key in self._fake.preempted]
        for request in kept_back:
            self.waiting.remove(request)
        step = super().schedule()
        self.waiting[:0] = kept_back
        if step is not None:
            step.seconds = self._fake.step_s
        return step

    def complete(self, step: Step) -> None:
        """Count what a step has computed: nothing for those whose token does not come."""
        for request in [request for request in step.samplers if self._held(request)]:
            step.samplers.remove(request)
            step.scheduled.remove(request)
            request.chunk = 0
        super().complete(step)

    def loaded(self, request: Request, tokens: int) -> None:
        """Record that KV has arrived; it must be that of the request's own tokens."""
        if request.hash != fold(request.prompt):
            self._fake.mistakes.append(f"{request.key} pulled the KV of other tokens")
        super().loaded(request, tokens)

    def _held(self, request: Request) -> bool:
        hold_at = self._fake.hold_at
        held = hold_at is not None and request.length >= hold_at and request.cut is None
        return held or self._fake.faults.silent_stream

    def _abort(self, request: Request) -> None:
        self._engine.abort(request)
        if request.stream:
            request.connection.end(api.last_event(request, [], "abort", None))
        else:
            request.connection.reply(api.whole(request, MODEL, "abort", None, None))


class NotedPins(Pins):
    """Pins that note the key of each that is pulled or released."""

    freed: list[str]

    def pulled(self, pin: Pin) -> None:
        """Free KV that has been pulled."""
        self._note(pin)
        super().pulled(pin)

    def release(self, key: str) -> bool:
        """Free the KV of a request that will not be pulled; return whether there was such a pin."""
        found = super().release(key)
        if found:
            self.freed.append(key)
        return found

    def _note(self, pin: Pin) -> None:
        if self.find(pin.id) is pin:
            self.freed.append(str(pin.key))


class SteeredPuller(Puller):
    """Pulls KV from other instances, and can fail once it is here."""

    def __init__(self, fake: "FakeInstance", http: aiohttp.ClientSession) -> None:
        super().__init__(http)
        self._fake = fake

    async def pull(
        self, source: dict[str, Any], expected_s: float, *, discard: bool = False, cached: int = 0
    ) -> Pulled:
        """Pull KV; PullError where the test wants it computed again."""
        pulled = await super().pull(source, expected_s, discard=discard, cached=cached)
        if self._fake.faults.fail_pull and not discard:
            raise PullError("the test lets pulls fail")
        return pulled
