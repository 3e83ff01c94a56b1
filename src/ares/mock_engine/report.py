"""Reports of a mock instance: `Hello`, telemetry, `/version`, `/metrics`, `/simulate/counters`."""

import itertools
import time
from typing import Any, Protocol

import msgspec

from ares import __version__
from ares.engine import forecast_metrics
from ares.engine.connector.step_times import StepTimes
from ares.engine.identity import InstanceSettings, describe
from ares.mock_engine.batch import Batch
from ares.mock_engine.faults import PREDICTIONS, FaultState, faulty_telemetry
from ares.mock_engine.pins import Pins
from ares.mock_engine.predictor import MockPredictor
from ares.mock_engine.request import Request
from ares.mock_engine.settings import EngineSettings, Identity
from ares.protocol import messages
from ares.protocol.fields import RequestState
from ares.protocol.messages import ROLES, Role

_FROZEN_POLL_S = 0.05


class Counters(msgspec.Struct):
    """Counts since the start.

    Once nothing runs, `arrived` is `finished` + `aborted`; a cut request counts as finished. `admitted` counts requests
    that were scheduled for the first time, `lag_s` the seconds by which this host was too slow for the profile's pace.
    """

    arrived: int = 0
    admitted: int = 0
    finished: int = 0
    aborted: int = 0
    cut: int = 0
    pulls: int = 0
    pulls_failed: int = 0
    tokens: int = 0
    lag_s: float = 0.0


class Described(Protocol):
    """What every mock instance is: its settings, and where it serves."""

    identity: Identity
    settings: EngineSettings
    boot: str

    @property
    def control_address(self) -> str:
        """Where its control channel is bound."""
        ...

    @property
    def role(self) -> Role:
        """Its role now."""
        ...


class Reported(Described, Protocol):
    """The state of a mock instance that reports read."""

    faults: FaultState
    predictor: MockPredictor
    batch: Batch
    pins: Pins
    requests: dict[str, Request]
    counters: Counters
    step_times: StepTimes

    @property
    def draining(self) -> bool:
        """Whether it drains."""
        ...


def hello(instance: Described) -> messages.Hello:
    """Return the message to a new subscriber."""
    identity, settings = instance.identity, instance.settings
    return messages.Hello(
        name=identity.name,
        role=identity.role,
        boot=instance.boot,
        peer=messages.Peer(instance.boot, identity.published_host, identity.port),
        block_size=settings.profile.block_size,
        kv_blocks=settings.kv_blocks,
        max_model_len=settings.max_model_len,
        versions={"ares": __version__, "vllm": engine_version(instance)},
        leases=True,
        max_num_seqs=settings.profile.max_num_seqs,
        max_num_batched_tokens=settings.profile.max_num_batched_tokens,
        kv_events=settings.prefix_caching,
        roles=[identity.role] if identity.fixed_role else list(ROLES),
        step_tokens=True,
    )


def description(instance: Described) -> messages.Description:
    """Return the body of `/ares/v1/instance`."""
    identity, settings = instance.identity, instance.settings
    launched = InstanceSettings(identity.name, instance.role, instance.boot, instance.control_address)
    return describe(launched, list(settings.names or (settings.model,)), settings.folder)


def models(instance: Described) -> dict[str, Any]:
    """Return the body of `/v1/models`."""
    settings = instance.settings
    entries = [
        {"id": name, "object": "model", "max_model_len": settings.max_model_len}
        for name in settings.names or (settings.model,)
    ]
    return {"object": "list", "data": entries}


def version(instance: Reported) -> dict[str, Any]:
    """Return the body of `/version`."""
    settings = instance.settings
    return {
        "version": engine_version(instance),
        "mock": True,
        "ares": __version__,
        "profile": settings.profile.name,
        "speed": settings.speed,
        "scheduling_policy": settings.policy,
        "predictions": instance.predictor.describe(),
        "logprobs": "made up",
        "outputs": f"log-normal, mean {settings.mean_output:g} tokens, sigma {settings.output_sigma:g}",
    }


def engine_version(instance: Described) -> str:
    """Return what stands for vLLM's version."""
    return f"mock (no model; profile {instance.settings.profile.name})"


class TelemetrySource:
    """Makes the telemetry, on the channel's thread: it copies what it iterates over, and only reads."""

    def __init__(self, instance: Reported) -> None:
        self._instance = instance
        self._numbers = itertools.count(1)
        self._newest: messages.Telemetry | None = None

    def __call__(self) -> messages.Telemetry | None:
        """Return the telemetry, changed by the telemetry fault if one is set; None where nothing is sent."""
        faults = self._instance.faults
        while faults.frozen_s:
            time.sleep(_FROZEN_POLL_S)
        fault, telemetry = faults.current.telemetry, _telemetry(self._instance, next(self._numbers))
        if fault != "constant" or self._newest is None:
            self._newest = telemetry
        return faulty_telemetry(fault, telemetry, self._newest, self._instance.settings.kv_blocks)


def _telemetry(instance: Reported, number: int) -> messages.Telemetry:
    """Return the true telemetry."""
    requests = list(instance.requests.values())
    running = 0
    steps = instance.step_times.totals
    rows = []
    for request in requests:
        state = request.state
        running += state == "running"
        if request.key is not None and state != "finished":
            rows.append(_row(instance, request))
    return messages.Telemetry(
        sequence=number,
        kv_blocks_used=instance.batch.total - instance.batch.free,
        running=running,
        waiting=len(requests) - running,
        pinned=len(instance.pins),
        step_time_s=steps.step_time_s,
        steps=steps.steps,
        preemptions=instance.batch.preemptions,
        rows=rows,
        busy_s=steps.busy_s,
        prompt_tokens=steps.prompt_tokens,
        prefilling=sum(request.remote_decode for request in requests),
    )


def _row(instance: Reported, request: Request) -> messages.Row:
    state = RequestState(request.state if request.state in ("running", "loading") else "waiting")
    output = len(request.output)
    # As on a real instance the first prediction comes with the first step.
    remaining = _remaining(instance, request, output) if output else None
    return messages.Row(
        request.key or "", 0 if state is RequestState.WAITING else request.length, output, state, remaining
    )


def _remaining(instance: Reported, request: Request, output: int) -> tuple[float, float, float] | None:
    fault = instance.faults.current.predictions
    if fault is not None and instance.predictor.sigma is not None:
        return PREDICTIONS[fault]
    limit = request.end - output
    true = min(limit, request.natural_end - output)
    return instance.predictor.remaining(request.prompt_hash, request.generated + output, true, limit)


def counters(instance: Reported) -> dict[str, Any]:
    """Return the body of `/simulate/counters`."""
    batch, pins = instance.batch, instance.pins
    states = [request.state for request in instance.requests.values()]
    return {
        "name": instance.identity.name,
        "boot": instance.boot,
        "generating": [r.key for r in instance.requests.values() if r.key is not None and r.state == "running"],
        **msgspec.to_builtins(instance.counters),
        "running": states.count("running"),
        "waiting": states.count("waiting") + states.count("arriving"),
        "loading": len(batch.loading),
        "preemptions": batch.preemptions,
        "prompt_tokens_computed": batch.prompt_tokens,
        "kv_blocks_used": batch.total - batch.free,
        "kv_blocks_pinned": pins.blocks,
        "pinned": len(pins),
        "pins_made": pins.counts.made,
        "pins_pulled": pins.counts.pulled,
        "pins_released": pins.counts.released,
        "pins_expired": pins.counts.expired,
    }


def metrics(instance: Reported) -> str:
    """Return the body of `/metrics`: the gauges of vLLM's that matter here, and our own that name the mock engine."""
    model = instance.settings.model.replace("\\", r"\\").replace('"', r"\"")
    label = f'{{model_name="{model}",engine="0"}}'
    computed = f'{{model_name="{model}",engine="0",source="local_compute"}}'
    batch, counts = instance.batch, instance.counters
    running = sum(request.state == "running" for request in instance.requests.values())
    values = [
        ("vllm:num_requests_running", "gauge", label, running),
        ("vllm:num_requests_waiting", "gauge", label, len(instance.requests) - running),
        ("vllm:kv_cache_usage_perc", "gauge", label, 1 - batch.free / batch.total),
        ("vllm:num_preemptions_total", "counter", label, batch.preemptions),
        ("vllm:generation_tokens_total", "counter", label, counts.tokens),
        ("vllm:prompt_tokens_by_source_total", "counter", computed, batch.prompt_tokens),
        ("ares:mock_engine", "gauge", f'{{profile="{instance.settings.profile.name}"}}', 1),
        ("ares:mock_engine_speed", "gauge", "", instance.settings.speed),
        ("ares:mock_engine_lag_seconds_total", "counter", "", counts.lag_s),
    ]
    load = msgspec.structs.replace(_telemetry(instance, 0), draining=instance.draining)
    values += [(name, "gauge", "", value) for name, _, value in forecast_metrics.values(hello(instance), load)]
    return "".join(f"# TYPE {name} {kind}\n{name}{labels} {value:.10g}\n" for name, kind, labels, value in values)
