"""Request ids, and clients that leave before the end."""

import asyncio
import contextlib
import json

import pytest

from tests.gateway.http.service import MODEL, PROMPT, Service, sample
from tests.waiting import eventually


async def test_request_ids(shared: Service) -> None:
    reply = await shared.client.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, headers={"x-request-id": "mine-1"}
    )
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.json()["id"] == "cmpl-mine-1"
    streamed = await shared.client.post(
        "/v1/completions", json={"prompt": PROMPT, "stream": True}, headers={"x-request-id": "mine-2"}
    )
    assert streamed.headers["x-request-id"] == "mine-2"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "tab\there", "ünicode"])
async def test_malformed_request_ids_are_replaced(shared: Service, given: str) -> None:
    reply = await shared.client.post(
        "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 2},
        headers={"x-request-id": given.encode("latin-1")},  # type: ignore[dict-item]
    )
    assert reply.status_code == 200
    made = reply.headers["x-request-id"]
    assert made != given
    assert len(made) == 32


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_the_generation(service: Service, stream: bool) -> None:
    task = asyncio.create_task(service.complete(max_tokens=4000, stream=stream))
    await eventually(lambda: any(s.emitted for s in service.gateway.sessions.values()))
    await eventually(lambda: any(fake.running for fake in service.fakes[1:]))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await service.quiet()
    await eventually(lambda: not service.gateway.sessions)
    assert sum(len(fake.aborted) for fake in service.fakes) == 1
    await eventually(lambda: sample(service, "ares_requests_total", route="completions", outcome="cancelled") == 1)


async def test_what_cannot_be_resumed_ends_with_an_error_in_its_stream(service: Service) -> None:
    for fake in service.fakes[1:]:
        fake.hold_at = 30
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 300, "seed": 1, "stream": True}
    async with service.client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        events = (line.removeprefix("data: ") async for line in reply.aiter_lines() if line)
        assert "choices" in json.loads(await anext(events))
        await next(fake for fake in service.fakes[1:] if fake.running).die()
        *_, last, end = [event async for event in events]
    failure = json.loads(last)["error"]
    assert "seed cannot be resumed exactly" in failure["message"]
    assert (failure["type"], end) == ("server_error", "[DONE]")


async def test_a_client_that_leaves_with_several_choices(service: Service) -> None:
    task = asyncio.create_task(service.complete(max_tokens=4000, n=4))
    await eventually(lambda: sum(len(fake.running) for fake in service.fakes[1:]) == 4)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await service.quiet()
    await eventually(lambda: not service.gateway.sessions)
