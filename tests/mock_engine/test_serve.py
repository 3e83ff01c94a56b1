"""The HTTP side: routes, bad input, slow readers, faults; and the commands that serve it."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from typer.testing import CliRunner

from ares.cli.main import app
from ares.engine.drain import OwnControlChannel
from ares.free_ports import free_ports
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.pool import Pool
from ares.mock_engine.serve import Server, identities
from ares.mock_engine.settings import FlagError, parse
from ares.mock_engine.transfer import Puller
from tests.mock_engine.cluster import MODEL, PROMPT, Cluster, serving, settings
from tests.mock_engine.test_model import tokenizer_folder
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)
GENERATE = "/inference/v1/generate"


class Client:
    """An HTTP client of one instance."""

    def __init__(self, cluster: Cluster, http: httpx.AsyncClient) -> None:
        self.cluster = cluster
        self.http = http
        self.port = cluster.servers["decode-0"].identity.port

    async def faults(self, **faults: Any) -> None:
        reply = await self.http.post("/simulate/faults", json=faults)
        assert reply.status_code == 200, reply.text

    async def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = (await self.http.get("/simulate/counters")).json()
        return counters

    async def raw(self, request: bytes) -> bytes:
        """Send bytes and return all that comes until the server closes the connection, or for a while."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        reply = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            async with asyncio.timeout(60):
                while data := await reader.read(1 << 16):
                    reply += data
        writer.close()
        return reply


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving(settings(), "decode") as cluster:
        url = cluster.servers["decode-0"].url
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            yield Client(cluster, http)


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"token_ids": PROMPT, "sampling_params": {"max_tokens": tokens, "ignore_eos": True}, **more}


def streamed(text: str) -> list[int]:
    """The tokens of a stream; fails where it did not end as it should."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [token for event in events[:-1] for token in json.loads(event)["choices"][0]["token_ids"]]


async def test_it_names_itself_a_mock(client: Client) -> None:
    version = (await client.http.get("/version")).json()
    assert version["mock"] is True
    assert version["version"].startswith("mock (no model")
    hello = client.cluster.known("decode-0").state.hello
    assert hello is not None
    assert hello.versions["vllm"].startswith("mock (no model")
    metrics = (await client.http.get("/metrics")).text
    assert 'ares:mock_engine{profile="test"} 1' in metrics
    assert 'vllm:num_requests_running{model_name="some/model",engine="0"} 0' in metrics
    assert "ares:predicted_peak_kv_usage_ratio 0\n" in metrics
    assert "ares:draining 0\n" in metrics


async def test_whole_and_streamed_replies_and_several_on_one_connection(client: Client) -> None:
    expected = MODEL.continuation(PROMPT, 9)
    for _ in range(2):
        whole = (await client.http.post(GENERATE, json=body(9, request_id="me"))).json()
        assert whole["request_id"] == "me"
        assert whole["choices"][0]["token_ids"] == expected
        assert whole["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": 9, "total_tokens": 49}
        assert streamed((await client.http.post(GENERATE, json=body(9, stream=True))).text) == expected
    data = json.dumps(body(3)).encode()
    request = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (GENERATE.encode(), len(data), data)
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert (await client.raw(request * 3 + last)).count(b"HTTP/1.1 200 OK") == 4


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        (GENERATE, b"", 400),
        (GENERATE, b"{", 400),
        (GENERATE, b"[]", 400),
        (GENERATE, b"\xff\xfe", 400),
        (GENERATE, b'{"token_ids": [1], "sampling_params": ' + b"[" * 100_000, 400),
        (GENERATE, b'{"token_ids": [1e400], "sampling_params": {}}', 400),
        ("/nothing", b"{}", 404),
        ("/simulate/pull", b"{}", 400),
        ("/simulate/pull", b'{"engine_id": "x", "request_id": "y"}', 404),
        ("/simulate/faults", b'{"nope": 1}', 400),
        ("/simulate/faults", b'{"slow": 0}', 400),
        ("/simulate/faults", b"[]", 400),
        (GENERATE, b"x" * (33 << 20), 413),
    ],
)
async def test_bad_bodies_get_an_error_in_vllms_form(client: Client, path: str, sent: bytes, status: int) -> None:
    reply = await client.http.post(path, content=sent)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.json()["error"]["code"] == status


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_no_http_is_refused_and_hung_up_on(client: Client, sent: bytes) -> None:
    assert (await client.raw(sent)).startswith(b"HTTP/1.1 4")
    assert (await client.http.get("/health")).status_code == 200


async def test_a_reader_that_is_behind_gets_every_token_once(client: Client) -> None:
    """The event loop signals when a client reads too slowly, and when it reads again; kernels buffer unlike amounts."""
    requests = client.cluster.instance("decode-0").requests
    task = asyncio.create_task(client.http.post(GENERATE, json=body(300, stream=True)))
    await eventually(lambda: client.cluster.counters("decode-0")["tokens"] > 20)
    (request,) = requests.values()
    request.connection.pause_writing()
    behind = len(request.output)
    await eventually(lambda: len(request.output) > behind + 20)
    request.connection.resume_writing()
    await eventually(lambda: len(request.output) > behind + 50)
    request.connection.pause_writing()  # and stays behind to its end
    reply = (await task).text
    assert streamed(reply) == MODEL.continuation(PROMPT, 300)
    assert reply.count("token_ids") < 300


async def test_a_client_that_leaves_is_an_abort(client: Client) -> None:
    for stream in (True, False):
        task = asyncio.create_task(client.http.post(GENERATE, json=body(5000, stream=stream)))
        await eventually(lambda: client.cluster.counters("decode-0")["running"] == 1)
        task.cancel()
        await client.cluster.at_rest()
    assert client.cluster.counters("decode-0")["aborted"] == 2


async def test_refusing_is_for_new_requests_only(client: Client) -> None:
    await client.faults(refuse=True)
    assert (await client.http.post(GENERATE, json=body(3))).status_code == 503
    assert (await client.http.get("/health")).status_code == 200
    await client.faults(refuse=False)
    assert (await client.http.post(GENERATE, json=body(3))).status_code == 200


async def test_dropped_streams_leave_nothing_behind(client: Client) -> None:
    streams = [asyncio.create_task(client.http.post(GENERATE, json=body(5000, stream=True))) for _ in range(5)]
    await eventually(lambda: client.cluster.counters("decode-0")["running"] == 5)
    await client.faults(drop_streams=True)
    assert all(isinstance(end, httpx.HTTPError) for end in await asyncio.gather(*streams, return_exceptions=True))
    await client.cluster.at_rest()


async def test_a_freeze_stops_everything_and_passes(client: Client) -> None:
    instance = client.cluster.known("decode-0")
    task = asyncio.create_task(client.http.post(GENERATE, json=body(300, stream=True)))
    await eventually(lambda: client.cluster.counters("decode-0")["tokens"] > 5)
    await client.faults(freeze_s=1.0)
    await asyncio.sleep(0.2)
    numbers = [instance.state.telemetry.sequence if instance.state.telemetry else 0]
    tokens = client.cluster.counters("decode-0")["tokens"]
    began = time.monotonic()
    assert (await client.http.get("/health")).status_code == 200
    assert time.monotonic() - began > 0.5
    numbers.append(instance.state.telemetry.sequence if instance.state.telemetry else 0)
    assert numbers[1] - numbers[0] <= 2
    assert client.cluster.counters("decode-0")["tokens"] - tokens < 20
    assert streamed((await task).text) == MODEL.continuation(PROMPT, 300)


@pytest.mark.parametrize(("fault", "tokens"), [("nan", "nan"), ("negative", "-200.0"), ("huge", "1e+300")])
async def test_predictions_can_be_nonsense(client: Client, fault: str, tokens: str) -> None:
    await client.faults(predictions=fault)
    task = asyncio.create_task(client.http.post(GENERATE, json=body(5000, kv_transfer_params={"ares_key": "a"})))
    instance = client.cluster.known("decode-0")

    def predicted() -> list[str]:
        rows = instance.state.telemetry.rows if instance.state.telemetry else []
        return [str(row.remaining[1]) for row in rows if row.remaining]

    await eventually(lambda: predicted() == [tokens])
    task.cancel()
    await client.cluster.at_rest()


async def test_telemetry_can_lie(client: Client) -> None:
    instance = client.cluster.known("decode-0")
    task = asyncio.create_task(client.http.post(GENERATE, json=body(5000, kv_transfer_params={"ares_key": "a"})))
    await eventually(lambda: bool(instance.state.telemetry and instance.state.telemetry.rows))
    await client.faults(telemetry="empty")
    await eventually(lambda: bool(instance.state.telemetry and not instance.state.telemetry.rows))
    await client.faults(telemetry="full")
    full = settings().kv_blocks
    await eventually(lambda: bool(instance.state.telemetry and instance.state.telemetry.kv_blocks_used == full))
    await client.faults(telemetry="constant")
    task.cancel()
    await client.cluster.at_rest()
    sequence = instance.state.telemetry.sequence if instance.state.telemetry else 0
    await eventually(lambda: bool(instance.state.telemetry and instance.state.telemetry.sequence > sequence + 3))
    assert instance.state.telemetry is not None
    assert instance.state.telemetry.rows
    await client.faults(telemetry=None)
    await eventually(lambda: bool(instance.state.telemetry and not instance.state.telemetry.rows))


async def test_an_instance_dies_on_command_and_comes_back(client: Client) -> None:
    boot = client.cluster.instance("decode-0").boot
    task = asyncio.create_task(client.http.post(GENERATE, json=body(5000, stream=True)))
    await eventually(lambda: client.cluster.counters("decode-0")["tokens"] > 5)
    await client.faults(die=True, restart_after_s=0.3)
    with pytest.raises(httpx.HTTPError):
        await task
    await eventually(lambda: client.cluster.servers["decode-0"].instance is not None)
    assert (await client.counters())["boot"] != boot
    assert (await client.counters())["arrived"] == 0
    assert (await client.http.post(GENERATE, json=body(3))).status_code == 200
    known = client.cluster.known("decode-0")
    await eventually(lambda: bool(known.state.hello and known.state.hello.boot != boot))


def test_flags_are_resolved_against_the_profile() -> None:
    flags = ["--kv-tokens", "1000", "--prediction-error", "none", "--max-num-seqs", "7", "--instances", "3"]
    resolved, instances = parse("llama-8b-rtx4090", "some/model", flags)
    assert (resolved.kv_blocks, resolved.max_model_len, instances) == (62, 992, 3)
    assert (resolved.prediction_error, resolved.profile.max_num_seqs) == (None, 7)


@pytest.mark.parametrize(
    "flags",
    [
        ["--speed", "0"],
        ["--speed", "nan"],
        ["--kv-tokens", "3"],
        ["--max-model-len", "2000", "--kv-tokens", "1000"],
        ["--prediction-error", "-1"],
        ["--gpu-memory-utilization", "0.9"],
        ["--instances", "0"],
        ["stray"],
    ],
)
def test_flags_that_cannot_be_used_are_named(flags: list[str]) -> None:
    with pytest.raises(FlagError, match=flags[0]):
        parse("llama-8b-rtx4090", "some/model", flags)


def test_the_command_names_a_wrong_profile() -> None:
    result = CliRunner().invoke(app, ["worker", "--role", "decode", "--simulate", "nope"])
    assert result.exit_code == 2
    assert "shipped profiles" in result.output


def test_the_command_serves_several_instances_and_ends_when_told(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, *(f" word{chr(97 + n)}" for n in range(20)))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    port = free_ports("127.0.0.1", 2)
    command = ["worker", "--simulate", "llama-8b-rtx4090", "--model", str(folder), "--role", "decode"]
    flags = ["--port", str(port), "--", "--instances", "2", "--speed", "100"]
    with subprocess.Popen([sys.executable, "-m", "ares", *command, *flags]) as process:
        try:
            names = [_described(f"http://127.0.0.1:{port + n}", process)["name"] for n in range(2)]
            assert names == [f"decode-{port}", f"decode-{port + 1}"]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def _described(url: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    while process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{url}/ares/v1/instance", timeout=10) as reply,  # noqa: S310 - our own address
        ):
            read: dict[str, Any] = json.load(reply)
            return read
        time.sleep(0.05)
    raise AssertionError("the command ended")


async def test_it_publishes_another_address_than_it_listens_on() -> None:
    """An instance on every address is followed, and pulled from, at the one that it publishes."""
    port = free_ports("0.0.0.0", 1)  # noqa: S104 - what it is about
    found = identities("wide", "both", "0.0.0.0", port, 0, 1, "127.0.0.7")  # noqa: S104 - what it is about
    async with aiohttp.ClientSession() as pulling, http_client() as http:
        server = Server(found[0], settings(), MODEL, Puller(pulling))
        await server.start()
        pool = Pool([f"http://127.0.0.1:{port}"], http, 0.02)
        pool.start()
        try:
            await eventually(lambda: pool.instances[0].open)
            hello = pool.instances[0].state.hello
            assert hello is not None
            assert hello.peer.host == "127.0.0.7"
            transfer = {"do_remote_decode": True}
            _, source = await pool.instances[0].engine.complete(body(1, kv_transfer_params=transfer))
            assert source is not None
            assert source["remote_host"] == "127.0.0.7"
        finally:
            await pool.stop()
            server.stop()


async def test_it_serves_on_an_ipv6_address() -> None:
    """HTTP and control channel, for the gateway and for the instance's own process."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    found = identities("six", "both", "::1", free_ports("::1", 1), 0, 1)
    async with aiohttp.ClientSession() as pulling, http_client() as http:
        server = Server(found[0], settings(), MODEL, Puller(pulling))
        await server.start()
        assert server.instance is not None
        own = OwnControlChannel(server.instance.control_address, None)
        following = asyncio.create_task(own.follow())
        pool = Pool([server.url], http, 0.02)
        pool.start()
        try:
            await eventually(lambda: pool.instances[0].open and own.telemetry is not None)
            delta, _ = await pool.instances[0].engine.complete(body(5))
            assert delta.token_ids == MODEL.continuation(PROMPT, 5)
        finally:
            following.cancel()
            await pool.stop()
            server.stop()
