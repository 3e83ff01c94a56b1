"""Who is let in: clients by key, operators by theirs, instances by the shared one; TLS; and what shows of the keys."""

import asyncio
import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from ares.cli.main import app
from ares.config import ConfigError, load
from ares.free_ports import free_ports
from ares.gateway.http.access import ClientKeys, TooManyStreamsError, take_streams
from ares.gateway.processes.shared_counts import SharedCounts
from ares.protocol.keys import ControlKey
from tests.certificates import self_signed
from tests.gateway.fakes import FakeInstance
from tests.gateway.gateways import hold, stop_holding
from tests.gateway.http.service import PROMPT, Service, serving
from tests.waiting import eventually

KEYS = ["alice-" + "a" * 32, "bob-" + "b" * 32]
ADMIN = "admin-" + "c" * 32
CONTROL = "control-" + "d" * 32
WORKER = "worker-" + "e" * 32


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def service(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Service]:
    async with serving(fakes, model_folder, api_keys=KEYS, admin_key=ADMIN) as made:
        await eventually(lambda: made.gateway.pool.ready, 15)
        yield made


async def test_each_client_has_a_key(service: Service) -> None:
    for key in KEYS:
        service.client.headers = httpx.Headers(bearer(key))
        assert (await service.complete()).status_code == 200
        assert (await service.client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(KEYS[0][:-1]),
        bearer(KEYS[0] + "x"),
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
        bearer(ADMIN),
        bearer("\u00e9"),
    ],
)
async def test_nobody_else_is_let_in(service: Service, headers: dict[str, str]) -> None:
    body = {"model": "some/model", "prompt": PROMPT}
    encoded = {name: value.encode() for name, value in headers.items()}
    for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
        reply = await service.client.request(method, path, json=body, headers=encoded)  # type: ignore[arg-type]
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert KEYS[0] not in reply.text
    assert all(not fake.asked for fake in service.fakes)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "this needs an API key: Authorization: Bearer KEY"),
        (bearer("wrong"), "this key is not known here; this needs an API key"),
        ({"Authorization": KEYS[0]}, "the Authorization header must read: Authorization: Bearer KEY"),
        ({"Authorization": "Basic eHg="}, "the Authorization header must read: Authorization: Bearer KEY"),
        ({"api-key": KEYS[0]}, "this needs an API key: Authorization: Bearer KEY (instead of the header api-key)"),
    ],
)
async def test_who_is_refused_hears_whether_the_key_is_missing_or_wrong(
    service: Service, headers: dict[str, str], message: str
) -> None:
    for path in ("/v1/models", "/admin/v1/status"):
        reply = await service.client.get(path, headers=headers)
        assert reply.status_code == 401
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        wanted = message.replace("this needs an API key", "the admin routes need their key")
        assert error["message"] == (wanted if path.startswith("/admin") else message)


async def test_a_key_may_be_where_clients_of_anthropic_put_it(service: Service) -> None:
    async def get(path: str, **headers: str) -> httpx.Response:
        return await service.client.get(
            path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )

    assert (await get("/v1/models", x_api_key=KEYS[0])).status_code == 200
    assert (await get("/v1/models", x_api_key=KEYS[1])).status_code == 200
    refused = await get("/v1/models", x_api_key="wrong")
    assert refused.status_code == 401
    assert "this key is not known here" in refused.json()["error"]["message"]
    # Authorization comes first.
    both = await get("/v1/models", x_api_key=KEYS[0], authorization="Bearer wrong")
    assert both.status_code == 401
    # The operator's key is taken from Authorization alone.
    admin = await get("/admin/v1/status", x_api_key=ADMIN)
    assert admin.status_code == 401
    assert "instead of the header x-api-key" in admin.json()["error"]["message"]


async def test_keys_are_compared_in_constant_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    right = False

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return right

    async def statuses(client: str, operator: str) -> list[int]:
        replies = [
            await service.client.get("/v1/models", headers=bearer(client)),
            await service.client.get("/admin/v1/status", headers=bearer(operator)),
        ]
        return [reply.status_code for reply in replies]

    monkeypatch.setattr("secrets.compare_digest", compare)
    control = ControlKey(CONTROL)
    # Nothing else decides: whatever it says, and every key is looked at, whichever is the right one.
    assert await statuses(KEYS[0], ADMIN) == [401, 401]
    assert not control.callback("", control.public)
    assert len(compared) == 2 * len(KEYS) + 1 + 1
    right = True
    assert await statuses("wrong", "wrong") == [200, 200]
    assert control.callback("", b"wrong")
    # It takes longer for longer ones: what is compared is of one length.
    assert {len(key) for pair in compared[: 2 * len(KEYS) + 1] for key in pair} == {32}


async def test_operators_bring_their_key_in_a_file_or_a_variable(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def status(*arguments: str) -> Any:
        command = ["status", "--json", "--url", f"http://127.0.0.1:{service.port}", *arguments]
        return await asyncio.to_thread(CliRunner().invoke, app, command)

    def said(result: Any) -> str:
        return " ".join(result.output.split())  # whatever the width

    monkeypatch.delenv("ARES_ADMIN_KEY", raising=False)
    assert "need their key" in said(await status())
    right, wrong = key_file(tmp_path, "right", ADMIN), key_file(tmp_path, "wrong", KEYS[0])
    assert (await status("--key-file", right)).exit_code == 0
    monkeypatch.setenv("ARES_ADMIN_KEY", ADMIN)
    assert (await status()).exit_code == 0
    assert (await status("--key-file", wrong)).exit_code == 1
    missing = await status("--key-file", str(tmp_path / "missing"))
    assert missing.exit_code == 2
    assert "No such file" in said(missing)


async def test_a_stranger_is_refused_before_the_body_comes(service: Service) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    assert b" 401 " in await asyncio.wait_for(reader.readline(), 60)
    writer.close()


async def test_probes_and_metrics_are_open_and_the_admin_routes_have_their_own_key(service: Service) -> None:
    for path in ("/health", "/ready", "/version", "/metrics", "/dashboard", "/docs", "/openapi.json"):
        assert (await service.client.get(path, follow_redirects=True)).status_code == 200, path
    assert (await service.client.get("/v1/models")).status_code == 401
    for headers, status in ((bearer(KEYS[0]), 401), ({}, 401), (bearer(ADMIN), 200)):
        assert (await service.client.get("/admin/v1/status", headers=headers)).status_code == status


async def test_metrics_can_be_closed(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, api_keys=KEYS, protect_metrics=True) as service:
        assert (await service.client.get("/metrics")).status_code == 401
        assert (await service.client.get("/metrics", headers=bearer(KEYS[1]))).status_code == 200


async def test_the_instances_get_their_own_key(fakes: list[FakeInstance], model_folder: Path) -> None:
    for fake in fakes:
        fake.api_key = WORKER
    async with serving(fakes, model_folder) as service:
        await eventually(lambda: "VLLM_API_KEY" in service.gateway.pool.why_not_ready, 15)
        assert "decode-0" not in service.gateway.pool.why_not_ready  # who it is, is not known before
        assert (await service.complete()).status_code == 503
    async with serving(fakes, model_folder, worker_api_key=WORKER) as service:
        await eventually(lambda: service.gateway.pool.ready, 15)
        assert (await service.complete()).status_code == 200


async def test_a_key_that_only_generations_need_is_named_in_the_log(
    fakes: list[FakeInstance], model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(fakes, model_folder) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[1].api_key = WORKER  # as behind a proxy that guards this route
        for _ in range(4):
            assert (await service.complete()).status_code == 200  # the other one has it
        for fake in fakes:
            fake.api_key = WORKER
        assert (await service.complete()).status_code == 502
    logged = [line.getMessage() for line in caplog.records if "VLLM_API_KEY" in line.getMessage()]
    first = re.compile(r"decode-0 \(http://\S+\) refused 1 requests: it answers 401; give the gateway")
    assert any(map(first.match, logged))
    assert len(logged) < 12


async def test_a_gateway_needs_the_control_key(fakes: list[FakeInstance], model_folder: Path) -> None:
    for fake in fakes:
        await fake.die()
        fake.control_key = CONTROL
        await fake.start()
    async with serving(fakes, model_folder, control_key="other-" + "f" * 32) as service:
        await asyncio.sleep(1.0)
        assert not service.gateway.pool.ready
    async with serving(fakes, model_folder, control_key=CONTROL) as service:
        await eventually(lambda: service.gateway.pool.ready, 15)
        assert (await service.complete()).status_code == 200


@contextlib.asynccontextmanager
async def of_many_keys(fakes: list[FakeInstance], folder: Path, maximum_streams: int) -> AsyncIterator[Service]:
    """Serve requests that do not end, at most so many of a key; the client holds the first key."""
    hold(fakes, 10)
    async with serving(fakes, folder, api_keys=KEYS, maximum_streams_per_key=maximum_streams) as service:
        await eventually(lambda: service.gateway.pool.ready, 15)
        service.client.headers = httpx.Headers(bearer(KEYS[0]))
        yield service


async def test_one_key_runs_only_so_many_requests(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with of_many_keys(fakes, model_folder, 2) as service:
        running = [asyncio.create_task(service.complete()) for _ in range(2)]
        await eventually(lambda: len(service.gateway.sessions) == 2, 15)
        refused = await service.complete()
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        service.client.headers = httpx.Headers(bearer(KEYS[1]))
        other = asyncio.create_task(service.complete())
        await eventually(lambda: len(service.gateway.sessions) == 3, 15)
        stop_holding(fakes)
        for task in (*running, other):
            assert (await task).status_code == 200
        service.client.headers = httpx.Headers(bearer(KEYS[0]))
        assert (await service.complete()).status_code == 200


async def test_one_key_runs_only_so_many_sequences(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with of_many_keys(fakes, model_folder, 4) as service:
        running = [asyncio.create_task(service.complete(prompt=[PROMPT, PROMPT]))]
        await eventually(lambda: len(service.gateway.sessions) == 2, 15)
        for body in ({"n": 3}, {"prompt": [PROMPT] * 3}, {"n": 64, "prompt": [PROMPT] * 8, "stream": True}):
            refused = await service.complete(**body)
            assert refused.status_code == 429, refused.text
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert "2 sequences of this key run already" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
        assert len(service.gateway.sessions) == 2
        running.append(asyncio.create_task(service.complete(n=2, stream=True)))
        await eventually(lambda: len(service.gateway.sessions) == 4, 15)
        assert (await service.complete()).status_code == 429
        service.client.headers = httpx.Headers(bearer(KEYS[1]))
        running.append(asyncio.create_task(service.complete(n=4)))
        await eventually(lambda: len(service.gateway.sessions) == 8, 15)
        stop_holding(fakes)
        assert [(await task).status_code for task in running] == [200] * 3
        for key in KEYS:  # nothing stays counted, of what was refused neither
            service.client.headers = httpx.Headers(bearer(key))
            assert (await service.complete(n=5)).status_code == 429
            assert (await service.complete(n=4)).status_code == 200


async def test_a_sequence_is_counted_before_it_is_checked_so_that_another_process_sees_it() -> None:
    class Watched(SharedCounts):
        """Of two processes that look at the same moment."""

        def seen_by_the_other(self) -> int:
            self.process = 1
            found = super().other_streams(0)
            self.process = 0
            return found

        def other_streams(self, key: int) -> int:
            seen.append(self.seen_by_the_other())
            return super().other_streams(key)

    seen: list[int] = []
    counts = Watched(2, 1)
    counts.process = 1
    counts.set_streams(0, 3)
    counts.process = 0

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        take_streams(scope, 2)
        message = "3 sequences of this key run already, and 3 would come; at most 5"
        with pytest.raises(TooManyStreamsError, match=message):
            take_streams(scope, 3)
        seen.append(counts.seen_by_the_other())  # it ends now, and keeps nobody out while it does

    async def nothing(*_: object) -> Any:
        raise AssertionError

    layer = ClientKeys(
        application,
        [SecretStr("one")],
        protect_metrics=False,
        maximum_streams=5,
        retry_after_s=lambda: 1,
        counts=counts,
    )
    key = [(b"authorization", b"Bearer one")]
    await layer({"type": "http", "method": "POST", "path": "/v1/completions", "headers": key}, nothing, nothing)
    assert seen == [1, 2, 3, 0]
    assert counts.seen_by_the_other() == 0


async def test_a_prompt_may_be_limited(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, maximum_prompt_tokens=5) as service:
        await eventually(lambda: service.gateway.pool.ready, 15)
        assert (await service.complete(prompt=[10] * 5)).status_code == 200
        refused = await service.complete(prompt=[10] * 6)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_retry_after_follows_the_queue(fakes: list[FakeInstance], model_folder: Path) -> None:
    for fake in fakes:
        fake.faults.hang = True
    async with serving(fakes, model_folder, maximum_waiting=1) as service:
        await eventually(lambda: service.gateway.pool.ready, 15)
        waiting = asyncio.create_task(service.complete())
        await eventually(lambda: len(service.gateway.backlog) == 1, 15)
        for ttft_s in (3.2, 7.4, 100.0):
            service.gateway.recent.ttft_s.add(ttft_s)
        refused = await service.complete()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "8")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


# --- configuration ---


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"api_keys": [""]}, "api_keys"),
        ({"admin_key": ""}, "admin_key"),
        ({"control_key": "hunter2"}, "shorter than 32"),
        ({"tls_key": "/nowhere/key.pem"}, "both"),
        ({"tls_key": "/nowhere/key.pem", "tls_certificate": "/nowhere/cert.pem"}, "no such file"),
    ],
)
def test_what_would_protect_nothing_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        load(model="m", workers=["http://a"], **setting)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("flags", [[], ["--simulate", "llama-8b-rtx4090"]])
def test_an_open_control_channel_is_refused(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    result = CliRunner().invoke(app, ["worker", "--role", "decode", "--host", "192.0.2.1", *flags])
    assert result.exit_code == 2
    assert "--control-key-file" in result.output


# --- processes ---


def key_file(folder: Path, name: str, *keys: str) -> str:
    (folder / name).write_text("\n".join(keys) + "\n")
    return str(folder / name)


@pytest.mark.timeout(180)
def test_over_tls_with_every_key_and_none_of_them_to_be_seen(model_folder: Path, tmp_path: Path) -> None:
    certificate, private = self_signed(tmp_path)
    control = key_file(tmp_path, "control", CONTROL)
    worker_port, port = (first := free_ports("127.0.0.1", 2)), first + 1
    worker = ["worker", "--simulate", "llama-8b-rtx4090", "--model", str(model_folder), "--role", "both"]
    worker += ["--port", str(worker_port), "--control-key-file", control, "--drain-deadline", "0"]
    gateway = ["gateway", "--worker", f"http://127.0.0.1:{worker_port}", "--model", str(model_folder)]
    gateway += ["--port", str(port), "--control-key-file", control, "--tls-certificate", str(certificate)]
    gateway += ["--tls-key", str(private), "--api-key-file", key_file(tmp_path, "clients", *KEYS)]
    gateway += ["--admin-key-file", key_file(tmp_path, "admin", ADMIN)]
    log = tmp_path / "log"
    with log.open("wb") as sink:
        processes = [
            subprocess.Popen([sys.executable, "-m", "ares", *command], stdout=sink, stderr=sink)
            for command in (worker, gateway)
        ]
    try:
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=30) as http:

            def ready() -> bool:
                try:
                    return (http.get("/ready")).status_code == 200
                except httpx.TransportError:
                    assert all(process.poll() is None for process in processes), log.read_text()
                    return False

            while not ready():
                time.sleep(0.1)
            body = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}
            assert (http.post("/v1/completions", json=body)).status_code == 401
            assert (http.post("/v1/completions", json=body, headers=bearer("wrong"))).status_code == 401
            reply = http.post("/v1/completions", json=body, headers=bearer(KEYS[1]))
            assert reply.status_code == 200, reply.text
            status = http.get("/admin/v1/status", headers=bearer(ADMIN))
            pages = [reply.text, status.text, (http.get("/metrics")).text]
        shown = [Path(f"/proc/{process.pid}/cmdline").read_text() for process in processes]
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait(60)
    for text in (*shown, *pages, log.read_text()):
        assert not any(secret in text for secret in (*KEYS, ADMIN, CONTROL))
