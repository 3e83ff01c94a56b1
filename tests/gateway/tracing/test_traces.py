"""Traces of requests, as a collector of OpenTelemetry gets them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ares.gateway.tracing.export import ExportingTracer
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.http.service import PROMPT, Service, serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.gateway.tracing.collector import Collector, collecting
from tests.waiting import eventually

TRACE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{CLIENT}-01", "tracestate": "vendor=1"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture
async def fakes() -> AsyncIterator[list[FakeInstance]]:
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as started:
        yield started


@contextlib.asynccontextmanager
async def traced(
    fakes: list[FakeInstance], folder: Path, collector: Collector, **settings: Any
) -> AsyncIterator[Service]:
    """A gateway that traces; at its end the collector has every span."""
    collector.spans.clear()
    async with serving(fakes, folder, IMPATIENT, otlp_traces_endpoint=collector.url, **settings) as made:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


async def post(service: Service, headers: dict[str, str], route: str = "completions", **body: Any) -> httpx.Response:
    sent = ({"prompt": PROMPT} if route == "completions" else {}) | {"max_tokens": 20, **body}
    return await service.client.post(f"/v1/{route}", json=sent, headers=headers)


async def test_one_trace_from_the_client_to_the_engines(
    fakes: list[FakeInstance], model_folder: Path, collector: Collector
) -> None:
    async with traced(fakes, model_folder, collector) as service:
        before = time.time()
        chat = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5}
        reply = await post(service, PARENT | {"x-request-id": "mine"}, "chat/completions", **chat)
        assert reply.status_code == 200
        usage, name = reply.json()["usage"], service.gateway.name
    assert {span.trace for span in collector.spans} == {TRACE}
    request = collector.one("chat some/model")
    assert (request.parent, request.kind, request.failed) == (CLIENT, "server", False)
    assert before <= request.start_s <= request.end_s <= time.time()
    told = request.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.id"] == "mine"
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "some/model"
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.temperature"]) == (20, 0.5)
    assert told["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.completion_tokens"] == usage["completion_tokens"] == 20
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"]
    assert (told["http.route"], told["ares.outcome"]) == ("/v1/chat/completions", "completed")
    steps = [collector.one(name) for name in ("prefill", "admission", "decode")]
    assert len(collector.spans) == 4
    assert {step.parent for step in steps} == {request.id}
    assert [step.kind for step in steps] == ["client", "internal", "client"]
    assert all(request.start_s <= step.start_s <= step.end_s <= request.end_s for step in steps)
    prefill, admission, decode = steps
    assert prefill.end_s <= admission.start_s
    assert admission.end_s <= decode.start_s
    # What the instances get: their own spans hang below the calls, and are found by the same names.
    for fake, call in zip(fakes, (prefill, decode), strict=False):
        assert fake.asked_within == {call.attributes["gen_ai.request.id"]: call.traceparent}
        assert (call.attributes["ares.instance"], call.attributes["server.port"]) == (fake.name, fake.port)
    assert decode.attributes["gen_ai.usage.completion_tokens"] == 19
    assert request.events == [("dispatch", {"ares.policy": "round_robin", "ares.instance": "decode-0"})]
    assert collector.resource["service.name"] == "ares-gateway"
    assert collector.resource["service.instance.id"] == name


async def test_a_move_and_what_comes_after_a_lost_instance(
    fakes: list[FakeInstance], model_folder: Path, collector: Collector
) -> None:
    async with traced(fakes, model_folder, collector) as service:
        task = asyncio.create_task(post(service, PARENT | {"x-request-id": "mine"}, max_tokens=400))
        await eventually(lambda: "mine" in service.gateway.sessions)
        session = service.gateway.sessions["mine"]
        await eventually(lambda: len(session.emitted) > 40)  # some full blocks
        moved = await service.client.post(
            "/admin/v1/migrations", json={"request_id": "mine", "target": "decode-1", "mode": "pre_copy"}
        )
        assert moved.json()["outcome"] == "moved"
        fakes[2].reset_connections()
        assert (await task).status_code == 200
    request, (first, second, *later) = collector.one("text_completion some/model"), collector.named("decode")
    move, copy = collector.one("migration"), collector.one("precopy")
    assert {span.trace for span in collector.spans} == {TRACE}
    assert {span.parent for span in (first, second, move)} == {request.id}
    assert copy.parent == move.id
    told = move.attributes
    assert (told["ares.source"], told["ares.target"]) == ("decode-0", "decode-1")
    assert (told["ares.trigger"], told["ares.outcome"], told["ares.mode"]) == ("commanded", "moved", "pre_copy")
    assert told["ares.stall_s"] == pytest.approx(moved.json()["stall_s"])
    within = fakes[2].asked_within
    assert within[copy.attributes["gen_ai.request.id"]] == copy.traceparent
    assert within[second.attributes["gen_ai.request.id"]] == second.traceparent
    assert first.start_s < move.start_s < second.start_s < move.end_s < second.end_s
    assert [first.failed, second.failed] == [False, True]
    assert second.attributes["error.type"] == "EngineLostError"
    assert not request.failed
    generated = [span.attributes["gen_ai.usage.completion_tokens"] for span in (first, second, *later)]
    assert sum(generated) + len(collector.named("prefill")) == 400


async def test_a_suspension(fakes: list[FakeInstance], model_folder: Path, collector: Collector) -> None:
    async with traced(fakes, model_folder, collector) as service:
        task = asyncio.create_task(post(service, {"x-request-id": "mine"}, max_tokens=200))
        await eventually(lambda: "mine" in service.gateway.sessions)
        session = service.gateway.sessions["mine"]
        await eventually(lambda: session.unmovable_now() is None)
        assert await session.suspend() == "suspended"
        assert (await task).status_code == 200
    (waited,), (_, prefilled), (first, second) = map(collector.named, ("suspended", "prefill", "decode"))
    assert first.end_s <= waited.start_s < waited.end_s <= prefilled.start_s < prefilled.end_s <= second.start_s
    assert prefilled.attributes["ares.tokens"] == waited.attributes["ares.tokens"] > len(PROMPT)


async def test_sequences_of_a_request_are_apart(
    fakes: list[FakeInstance], model_folder: Path, collector: Collector
) -> None:
    async with traced(fakes, model_folder, collector) as service:
        assert (await post(service, PARENT | {"x-request-id": "mine"}, n=2)).status_code == 200
    request, both = collector.one("text_completion some/model"), collector.named("sequence")
    assert {span.attributes["gen_ai.request.id"] for span in both} == {"mine-0", "mine-1"}
    assert {span.parent for span in both} == {request.id}
    assert {span.parent for span in collector.named("decode")} == {span.id for span in both}
    assert request.attributes["gen_ai.usage.completion_tokens"] == 40


async def test_requests_that_fail_are_refused_or_are_left(
    fakes: list[FakeInstance], model_folder: Path, collector: Collector
) -> None:
    async with traced(fakes, model_folder, collector) as service:
        assert (await post(service, PARENT, max_tokens=0, echo=False, n=9999)).status_code == 400
        fakes[0].faults.refuse = fakes[1].faults.refuse = fakes[2].faults.refuse = 422
        assert (await post(service, {"x-request-id": "unlucky"})).status_code == 422
        fakes[0].faults.refuse = fakes[1].faults.refuse = fakes[2].faults.refuse = None
        body = {"prompt": PROMPT, "max_tokens": 4000, "stream": True}
        async with service.client.stream("POST", "/v1/completions", json=body) as stream:
            await anext(stream.aiter_lines())
        await eventually(lambda: not service.gateway.sessions)
    refused, failed, left = collector.named("text_completion some/model")
    assert (refused.attributes["http.response.status_code"], refused.failed) == (400, False)
    assert refused.parent == CLIENT
    assert (failed.attributes["ares.outcome"], failed.attributes["error.type"]) == ("failed", "EngineRefusedError")
    assert failed.failed
    assert any(span.failed and span.parent == failed.id for span in collector.named("prefill"))
    assert (left.attributes["ares.outcome"], left.failed) == ("cancelled", False)
    assert left.attributes["gen_ai.usage.completion_tokens"] > 0


@pytest.mark.parametrize(
    "given",
    [
        "",
        "nonsense",
        f"00-{'0' * 32}-{CLIENT}-01",
        f"ff-{TRACE}-{CLIENT}-01",
        f"00-{TRACE}-{CLIENT}-zz",
        "00-" + "f" * 9000,
    ],
)
async def test_a_client_s_bad_traceparent_begins_a_new_trace(given: str) -> None:
    tracer = ExportingTracer("http://127.0.0.1:1/v1/traces", "gateway", 1)
    span = tracer.begin("chat", {"traceparent": given, "tracestate": "a=b\x00,=,,"})
    version, trace, _, flags = span.headers["traceparent"].split("-")
    assert (version, int(flags, 16) & 1) == ("00", 1)
    assert trace not in (TRACE, "0" * 32)
    assert set(span.headers) == {"traceparent"}
    tracer.shutdown()


async def test_a_trace_that_its_client_does_not_sample_is_not_sent(
    fakes: list[FakeInstance], model_folder: Path, collector: Collector
) -> None:
    async with traced(fakes, model_folder, collector) as service:
        assert (await post(service, {"traceparent": f"00-{TRACE}-{CLIENT}-00"})).status_code == 200
    assert collector.spans == []
    # And the engines are told so.
    (within,) = fakes[1].asked_within.values()
    assert within.startswith(f"00-{TRACE}-")
    assert within.endswith("-00")


async def test_a_collector_that_fails_holds_up_no_end() -> None:
    with collecting() as collector:
        collector.status = 503
        tracer = ExportingTracer(f"{collector.url}/v1/traces", "gateway", flush_s=0.1)
        tracer.begin("chat", {}).end()
        begun = time.monotonic()
        await tracer.close()
        assert time.monotonic() - begun < 2


async def test_off_nothing_is_sent_along(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, IMPATIENT) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        assert (await post(service, PARENT)).status_code == 200
    assert [within for fake in fakes for within in fake.asked_within.values()] == ["", ""]


async def test_a_model_s_name_without_end_is_cut(
    fakes: list[FakeInstance], model_folder: Path, collector: Collector
) -> None:
    """Spans wait for the collector, thousands of them."""
    async with traced(fakes, model_folder, collector) as service:
        assert (await post(service, {}, model="m" * 100_000)).status_code == 404
    (span,) = collector.spans
    assert len(span.name) + len(span.attributes["gen_ai.request.model"]) < 2000


@pytest.mark.parametrize("state", ["=,=", "A=1", "a=1,a=2", "a" * 300])
def test_a_client_s_bad_tracestate_is_not_logged(state: str, caplog: pytest.LogCaptureFixture) -> None:
    tracer = ExportingTracer("http://127.0.0.1:1/v1/traces", "gateway", 1)
    span = tracer.begin("chat", PARENT | {"tracestate": state})
    assert span.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert not caplog.records
    tracer.shutdown()
