"""Bytes on the HTTP ports: of the gateway, and of mock engines, which read HTTP by themselves."""

import asyncio
import contextlib
import json
import re

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from hypothesis import example
from hypothesis import strategies as st

from ares.engine import identity as instance
from ares.engine.plugin import InstancePlugin
from ares.gateway.openai.replies import Choice, Envelope
from ares.gateway.openai.text import Detokenizer, TextModel
from ares.gateway.pool.connection import BrokenReplyError, Connection
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.stream import Stream
from tests.fuzz.cases import edited, fuzz, json_texts, noise, warped
from tests.fuzz.service import MODEL, Service
from tests.transports import Nowhere

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
GENERATE = {
    "request_id": "fuzz",
    "model": MODEL,
    "token_ids": [3, 4, 5],
    "stream": False,
    "priority": 0,
    "sampling_params": {
        "max_tokens": 4,
        "min_tokens": 0,
        "n": 1,
        "ignore_eos": True,
        "logprobs": 1,
        "stop_token_ids": [7],
        "extra_args": {"ares_mock_output_tokens": 3},
    },
    "kv_transfer_params": {"ares_key": "key", "ares_generated": 1, "do_remote_decode": False},
}
PULLING = {
    **GENERATE,
    "kv_transfer_params": {
        "do_remote_prefill": True,
        "remote_engine_id": "nobody",
        "remote_request_id": "nothing",
        "remote_host": "127.0.0.1",
        "remote_port": 1,
    },
}
PULL, EXTEND = {"engine_id": "x", "request_id": "y", "discard": True}, {"engine_id": "x", "request_ids": ["y"]}


def request(method: str, path: str, body: str = "") -> bytes:
    data = body.encode("utf-8", "surrogatepass")
    return b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
        method.encode(),
        path.encode(),
        len(data),
        data,
    )


CHUNKED = (
    b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n2\r\n1}\r\n0\r\n\r\n'
)
UPGRADE = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
HEADS = [request("GET", "/health"), CHUNKED, UPGRADE, request("GET", "/health") * 20]
TO_GATEWAY = [
    *HEADS,
    request("POST", "/v1/completions", json.dumps({"prompt": "Hi", "max_tokens": 3})),
    request("GET", "/admin/v1/status"),
]
TO_ENGINE = [
    *HEADS,
    request("POST", "/inference/v1/generate", json.dumps(GENERATE)),
    request("POST", "/inference/v1/generate", json.dumps({**GENERATE, "stream": True})),
    request("POST", "/simulate/pull", json.dumps(PULL)),
    request("GET", "/simulate/counters"),
    request("GET", "/metrics"),
]


def check(answer: bytes) -> None:
    """Every answer is HTTP, and none says that the server failed."""
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:100]
    assert all(int(status) < 500 for status in STATUS.findall(answer)), answer[:1000]


@fuzz("http: bytes to the gateway", 40, data=noise(*TO_GATEWAY))
@example(data=b"GET / HTTP/1.1\r\nHost: [\r\n\r\n")
@example(data=b"GET /" + b"x" * 40_000)
@example(data=b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n")
@example(data=b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n")
def test_bytes_to_the_gateway(service: Service, data: bytes) -> None:
    check(service.raw(data))


@fuzz("http: bytes to a mock engine", 60, data=noise(*TO_ENGINE))
@example(data=UPGRADE)
@example(data=request("GET", "/health") * 40)
def test_bytes_to_a_simulated_engine(service: Service, data: bytes) -> None:
    check(service.raw(data, service.stray_port))


_seeds = {
    "/inference/v1/generate": [GENERATE, {**GENERATE, "stream": True}, PULLING],
    "/simulate/pull": [PULL],
    "/simulate/extend": [EXTEND],
}


@fuzz("http: warped bodies to a mock engine", 120, path=st.sampled_from(sorted(_seeds)), data=st.data())
@example(path="/simulate/extend", data=None)
def test_warped_bodies_to_a_simulated_engine(service: Service, path: str, data: st.DataObject | None) -> None:
    body = data.draw(warped(*_seeds[path])) if data is not None else '"\udcff"'
    reply = service.send("POST", path, body.encode("utf-8", "surrogatepass"), port=service.stray_port)
    assert reply.status < 500, reply.body
    if reply.status >= 400:
        error = msgspec.json.decode(reply.body)["error"]
        assert error["message"]
        assert error["code"] == reply.status


@fuzz("http: faults of a mock engine", 30, value=json_texts, name=st.sampled_from(["refuse", "slow", "x", "die"]))
def test_faults_are_taken_or_refused(service: Service, value: str, name: str) -> None:
    if (name, value) == ("die", "true"):
        return
    body = f'{{"{name}":{value}}}'.encode("utf-8", "surrogatepass")
    reply = service.send("POST", "/simulate/faults", body, port=service.stray_port)
    assert reply.status in {200, 400}, reply.body
    restore = b'{"refuse": false, "slow": 1.0}'
    assert service.send("POST", "/simulate/faults", restore, port=service.stray_port).status == 200


@fuzz("http: pipelined requests", 20, parts=st.lists(edited(*TO_ENGINE[:1], *TO_ENGINE[4:]), min_size=2, max_size=6))
@example(parts=[TO_ENGINE[4], b'POST /simulate/pull HTTP/1.1\r\nContent-Length: 3\r\n\r\n"\xff"', TO_ENGINE[4]])
def test_pipelined_requests(service: Service, parts: list[bytes]) -> None:
    check(service.raw(b"".join(parts), service.stray_port))


# --- what a gateway reads of an instance ---

_chunk = {
    "request_id": "x",
    "choices": [
        {
            "index": 0,
            "token_ids": [3, 4],
            "finish_reason": "stop",
            "stop_reason": None,
            "logprobs": {"content": [{"token_id": 3, "logprob": -0.5, "top_logprobs": []}]},
        }
    ],
}
_failure = {"error": {"message": "the engine failed", "code": 500}}


def _streamed(*events: str) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    bodies = [f"data: {event}\n\n".encode("utf-8", "surrogatepass") for event in events]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


_whole = _streamed(json.dumps(_chunk), json.dumps(_chunk), "[DONE]")
_refused = b'HTTP/1.1 400 Bad Request\r\ncontent-length: 27\r\n\r\n{"error":{"message":"no!"}}'
_from_engine = noise(_whole, _refused) | warped(_chunk, _failure).map(lambda event: _streamed(event, "[DONE]"))


async def _read(data: bytes, text_model: TextModel) -> None:
    connection, stream = Connection(), Stream()
    connection.connection_made(Nowhere())
    connection.send(b"", stream)
    connection.data_received(data)
    connection.connection_lost(None)
    with contextlib.suppress(BrokenReplyError, EngineLostError, EngineRefusedError):
        if await stream.ready != 200:
            await stream.text()
            return
        choice = Choice(
            Envelope("x", MODEL, chat=True), 0, Detokenizer(text_model.tokenizer, [3]), text_model, logprobs=1
        )
        async for batch in stream.batches():
            choice.stream(batch)


@fuzz("http: bytes from an instance", 150, data=_from_engine)
@example(data=_streamed('{"error": {"code": "none"}}'))
@example(data=_streamed('{"error": {"code": [1]}}'))
@example(data=_streamed('{"choices": [{"finish_reason": "\udcff"}]}'))
@example(data=_streamed('{"x": ' + "[" * 100_000))
@example(data=_streamed('{"choices": [{"token_ids": [-1, 99999999999999999999999]}]}'))
def test_bytes_from_an_instance(text_model: TextModel, data: bytes) -> None:
    asyncio.run(_read(data, text_model))


# --- what an instance adds to vLLM's server ---


@pytest.fixture(scope="module")
def own_routes() -> FastAPI:
    app = FastAPI()
    settings = instance.InstanceSettings("decode-0", "decode", "b", "tcp://127.0.0.1:1", drain_deadline_s=0.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(instance, "current", lambda: settings)
        InstancePlugin().attach_router(app)
    return app


@fuzz(
    "http: the routes of an instance",
    20,
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=st.sampled_from(["/ares/v1/instance", "/ares/v1/ready", "/ares/v1/ready/", "/ares/v1", "/ares/v1/%ff"]),
    body=st.binary(max_size=50),
    headers=st.dictionaries(
        st.sampled_from(["x-request-id", "content-type", "range"]), st.binary(max_size=20), max_size=2
    ),
)
def test_the_routes_of_an_instance(
    own_routes: FastAPI, method: str, path: str, body: bytes, headers: dict[str, bytes]
) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(own_routes)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, content=body, headers=list(headers.items()))

    reply = asyncio.run(ask())
    assert reply.status_code < 500 or (reply.status_code, reply.json()) == (503, {"status": "starting"})
