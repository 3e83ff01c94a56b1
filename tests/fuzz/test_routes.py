"""The gateway's routes: whatever is sent, an answer in OpenAI's form comes, and nothing is left behind."""

import contextlib
import json
import socket
from functools import lru_cache
from typing import Any

import pytest
import schemathesis
from hypothesis import example
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ares.gateway.anthropic.requests import MessagesRequest
from ares.gateway.openai import unsupported
from ares.gateway.openai.requests import ChatRequest, CompletionRequest
from ares.gateway.openai.responses.requests import ResponsesRequest
from tests.fuzz.cases import NASTY, fuzz, json_texts, noise, warped
from tests.fuzz.service import LONGEST, MODEL, PATIENCE_S, Reply, Service
from tests.gateway.learner_reports import report

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
GENERATION = [CHAT, TEXT, RESPONSES, MESSAGES]
MIGRATIONS, PRESET, PREDICTOR = "/admin/v1/migrations", "/admin/v1/preset", "/admin/v1/predictor"
PUT = {PRESET, PREDICTOR}
INSTANCES, WORKERS = "/admin/v1/instances", "/workers"
DRAIN, UNDRAIN = "/admin/v1/instances/{name}/drain", "/admin/v1/instances/{name}/undrain"
ROLE = "/admin/v1/instances/{name}/role"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
    TEXT: {"model": MODEL, "prompt": "Hi", "max_tokens": 8},
    RESPONSES: {"model": MODEL, "input": "Hi", "max_output_tokens": 8},
    MESSAGES: {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
    COUNT: {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    TOKENIZE: {"model": MODEL, "prompt": "Hi"},
    DETOKENIZE: {"model": MODEL, "tokens": [5, 6]},
    MIGRATIONS: {"request_id": "nobody", "target": "decode-0", "mode": "auto"},
    DRAIN.format(name="nobody"): {"deadline_s": 5.0},
    ROLE.format(name="nobody"): {"role": "both", "deadline_s": 5.0},
    PRESET: {"preset": "nonsense"},
    INSTANCES: {"url": "nonsense"},
    WORKERS: {"url": "ftp://nonsense"},
    PREDICTOR: report(),
}
_REQUESTS = (ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest)
FIELDS = sorted({"unknown", *unsupported.refused()}.union(*(request.model_fields for request in _REQUESTS)))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_the_schema_tells_of_all_routes(service: Service) -> None:
    paths = service.schema["paths"]
    written = {path for path, routes in paths.items() if {"post", "put"} & routes.keys()}
    assert written == {
        *GENERATION,
        COUNT,
        TOKENIZE,
        DETOKENIZE,
        MIGRATIONS,
        PRESET,
        PREDICTOR,
        INSTANCES,
        WORKERS,
        DRAIN,
        UNDRAIN,
        ROLE,
    }
    for path, routes in paths.items():
        for method, route in routes.items():
            assert "422" not in route["responses"], (method, path)
            if path in written:
                assert route["responses"]["default"]["content"]["application/json"]["schema"]["$ref"], path
    assert {p["name"] for p in paths[CHAT]["post"]["parameters"]} == {"x-request-id", "x-ares-class"}
    assert set(paths[CHAT]["post"]["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


# --- from the schema ---


@lru_cache
def _cases(schema: str, path: str, mode: GenerationMode) -> st.SearchStrategy[Any]:
    operations = schemathesis.openapi.from_dict(json.loads(schema))[path]
    method = "PUT" if path in PUT else "POST"
    return operations[method].as_strategy(generation_mode=mode)


@pytest.mark.parametrize(
    "path",
    [*GENERATION, COUNT, TOKENIZE, DETOKENIZE, MIGRATIONS, INSTANCES, WORKERS, DRAIN, UNDRAIN, ROLE, PRESET, PREDICTOR],
)
@fuzz("routes: requests from the OpenAPI schema", 12, data=st.data(), negative=st.booleans())
def test_what_the_schema_allows_and_what_not(service: Service, path: str, data: st.DataObject, negative: bool) -> None:
    modes = [GenerationMode.NEGATIVE if negative and path != UNDRAIN else GenerationMode.POSITIVE]
    case = data.draw(_cases(json.dumps(service.schema), path, modes[0]))
    reply = case.call(base_url=f"http://127.0.0.1:{service.port}", timeout=PATIENCE_S)
    case.validate_response(reply, checks=CHECKS)


# --- by hand ---


def _text(fields: list[tuple[str, str]]) -> str:
    """Return an object whose keys may come twice; the last one counts."""
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in fields) + "}"


_fields = st.lists(st.tuples(st.sampled_from(FIELDS) | st.text(max_size=5), json_texts), max_size=4)


@fuzz("routes: fields with odd values", 120, path=st.sampled_from(GENERATION), fields=_fields, stream=st.booleans())
@example(path=TEXT, fields=[("\ud800", "1")], stream=False)
@example(path=TEXT, fields=[("n", "128"), ("ignore_eos", "true"), ("max_tokens", "40")], stream=True)
@example(path=TEXT, fields=[("prompt", json.dumps(["a"] * 200)), ("n", "128")], stream=False)
@example(path=CHAT, fields=[("stop", json.dumps(["x"] * 1000))], stream=True)
@example(path=CHAT, fields=[("vllm_xargs", '{"a": 123456789012345678901234567890}')], stream=False)
@example(path=CHAT, fields=[("top_k", "9" * 400)], stream=False)
@example(path=TEXT, fields=[("echo", "true"), ("max_tokens", "0"), ("stream_interval", "3")], stream=True)
@example(path=TEXT, fields=[("truncate_prompt_tokens", "-1"), ("truncation_side", '"left"')], stream=False)
@example(path=TEXT, fields=[("prompt", '"\\u00e9"'), ("truncate_prompt_tokens", "1")], stream=False)
@example(path=CHAT, fields=[("truncate_prompt_tokens", "0")], stream=False)
@example(path=CHAT, fields=[("bad_words", json.dumps(["x" * 2000, "y", " "]))], stream=False)
@example(path=CHAT, fields=[("response_format", '{"type":"structural_tag","format":{"a":[null,1e999]}}')], stream=True)
@example(path=TEXT, fields=[("logprobs", "-1")], stream=False)
@example(path=TEXT, fields=[("priority", str(2**63 - 1)), ("seed", "-1"), ("n", "2")], stream=False)
@example(path=CHAT, fields=[("return_prompt_text", "true"), ("return_token_ids", "true")], stream=True)
def test_odd_values(service: Service, path: str, fields: list[tuple[str, str]], stream: bool) -> None:
    body = [(name, json.dumps(value)) for name, value in BODIES[path].items()]
    service.post(path, _text([*body, ("stream", json.dumps(stream)), *fields])).check()


@pytest.mark.parametrize("value", NASTY, ids=lambda value: value[:20])
@fuzz("routes: fields with odd values", 1, path=st.sampled_from(GENERATION))
def test_odd_values_of_what_no_field_is(service: Service, value: str, path: str) -> None:
    """What nobody checks is passed on, or ignored."""
    content = f'[{{"role":"user","content":{value}}}]'
    fields = [("messages", content), ("input", content), ("prompt", '"Hi"'), ("max_tokens", "4"), ("unknown", value)]
    service.post(path, _text(fields)).check()


@fuzz("routes: warped bodies", 80, path=st.sampled_from(sorted(BODIES)), data=st.data())
def test_warped_bodies(service: Service, path: str, data: st.DataObject) -> None:
    body = data.draw(warped(BODIES[path], {**BODIES[path], "stream": True, "stream_options": {"include_usage": True}}))
    method = "PUT" if path in PUT else "POST"
    encoded = body.encode("utf-8", "surrogatepass")
    service.send(method, path, encoded, {"Content-Type": "application/json"}).check()


_TYPES = ["application/json", "application/json; charset=utf-16", "text/plain", "multipart/form-data", "x", "", ";;=,"]
_ENCODINGS = ["identity", "gzip", "br", "chunked", "\xff"]
_header_values = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)


@fuzz(
    "routes: bytes, methods and headers",
    60,
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"]),
    path=st.sampled_from(
        [
            *BODIES,
            "/",
            "/v1",
            "/v1/models/",
            "/workers/http://nobody:1",
            "/workers/[",
            f"{INSTANCES}/http%3A%2F%2F[",
            "/admin/v1",
            "/%00",
            "/%ff%fe",
            "//",
            "/openapi.json",
        ]
    ),
    body=noise(*(json.dumps(body).encode() for body in BODIES.values())) | st.text().map(lambda t: t.encode("utf-16")),
    kind=st.sampled_from(_TYPES),
    encoding=st.sampled_from(_ENCODINGS),
    headers=st.dictionaries(
        st.sampled_from(["X-Request-Id", "X-Ares-Class", "Authorization", "Host", "Accept", "Cookie", "Range"]),
        _header_values,
        max_size=3,
    ),
)
@example(method="GET", path="/v1", body=b"", kind="", encoding="identity", headers={"Host": "["})
def test_bytes_methods_and_headers(
    service: Service, method: str, path: str, body: bytes, kind: str, encoding: str, headers: dict[str, str]
) -> None:
    reply = service.send(
        method, path, body, {"Content-Type": kind, "Content-Encoding": encoding, **headers, "Connection": "close"}
    )
    reply.check()
    if method == "BREW":
        assert 400 <= reply.status < 500


# --- who does not stay to the end ---


@fuzz(
    "routes: bodies cut off and streams left",
    40,
    path=st.sampled_from([CHAT, TEXT]),
    stream=st.booleans(),
    sent=st.floats(0, 1),
    chunked=st.booleans(),
    read=st.integers(0, 2000),
)
def test_hanging_up(service: Service, path: str, stream: bool, sent: float, chunked: bool, read: int) -> None:
    fields = {**BODIES[path], "max_tokens": LONGEST // 2, "ignore_eos": True, "n": 3, "stream": stream}
    body = json.dumps(fields).encode()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()
    if chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    data = head + body[: int(sent * len(body))]
    client = socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S)
    with client, contextlib.suppress(ConnectionError):
        client.sendall(data)
        while sent == 1.0 and read > 0 and (part := client.recv(min(read, 500))):
            read -= len(part)


def test_a_body_that_does_not_come_to_its_end_is_not_waited_for(service: Service) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as client:
        client.sendall(head)
        with contextlib.suppress(ConnectionError):
            assert client.recv(100) == b""


# --- operators ---

_NAMES = ["prefill-0", "decode-0", "decode-1", "nobody", "../x", "%2e", "decode-0/drain", ""]
_commands = st.one_of(
    st.tuples(st.just("drain"), st.sampled_from(_NAMES)),
    st.tuples(st.just("undrain"), st.sampled_from(_NAMES)),
    st.tuples(
        st.just("preset"), st.sampled_from(["off", "ares", "ares-no-prediction", "static-rr", "x", "ares-oracle"])
    ),
    st.tuples(st.sampled_from(["auto", "stop_and_copy", "pre_copy", "x"]), st.sampled_from(_NAMES)),
)


@fuzz("routes: commands while requests run", 10, commands=st.lists(_commands, min_size=1, max_size=8))
def test_commands_while_requests_run(service: Service, commands: list[tuple[str, str]]) -> None:
    body = {**BODIES[TEXT], "max_tokens": LONGEST // 2, "ignore_eos": True, "n": 4, "stream": True}
    sent = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as client:
            client.sendall(head.encode() + sent)
            for command, name in commands:
                _carry_out(service, command, name).check()
            received = b""
            while part := client.recv(1 << 16):
                received += part
    finally:
        for name in _NAMES[:3]:
            assert _carry_out(service, "undrain", name).status == 200
        assert _carry_out(service, "preset", "ares").status == 200
    status = int(received.split(b" ", 2)[1])
    assert status == 503 or (status == 200 and b"data: [DONE]\n\n" in received)


def _carry_out(service: Service, command: str, name: str) -> Reply:
    headers = {"Content-Type": "application/json"}
    if command in {"drain", "undrain"}:
        body = b'{"deadline_s": 0.2}' if command == "drain" else None
        return service.send("POST", f"/admin/v1/instances/{name}/{command}", body, headers)
    if command == "preset":
        return service.send("PUT", PRESET, json.dumps({"preset": name}).encode(), headers)
    wanted = {"request_id": "mine-1", "target": name, "mode": command}
    return service.send("POST", MIGRATIONS, json.dumps(wanted).encode(), headers)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/ready", "/version", "/metrics", "/admin/v1/status", PREDICTOR, "/openapi.json"]
)
def test_what_is_only_read(service: Service, path: str) -> None:
    reply = service.send("GET", path)
    assert reply.status == 200
    reply.check()
