"""`ares up` as a user runs it: the default model, sense in its answers, moves by policy, a death, and nothing left."""

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from ares.models.resolve import DEFAULT_MODEL
from tests.integration.client import Client
from tests.waiting import eventually_found

PORT = 8030
# Tokens take about 40 ms each: enough for an order in the middle.
LENGTH = 150


@pytest.fixture(scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    logs = tmp_path_factory.mktemp("up-logs")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ares", "up", "--port", str(PORT), "--log-folder", str(logs)),
        # A stream that is prefilled anew after a death has the same tokens in this precision only.
        *("--dtype", "float32"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process, logs
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


@pytest.mark.timeout(600)
async def test_serves_answers_balances_and_leaves_nothing(up: tuple[asyncio.subprocess.Process, Path]) -> None:
    process, logs = up
    assert process.stdout is not None
    first = (await asyncio.wait_for(process.stdout.readline(), 300)).decode()
    assert first.startswith(f"serving {DEFAULT_MODEL} on http://127.0.0.1:{PORT}/v1"), first
    assert str(logs) in first
    welcome = ""
    while "Ctrl-C" not in welcome:
        welcome += (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    assert f"curl -N http://127.0.0.1:{PORT}/v1/chat/completions" in welcome

    url = f"http://127.0.0.1:{PORT}"
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 30,
    }
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        async with http.post(f"{url}/v1/chat/completions", json=body) as reply:
            choice = (await reply.json())["choices"][0]
        assert "Paris" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        await _policy_evens_out(Client(http, url, DEFAULT_MODEL))
        await _commands(Client(http, url, DEFAULT_MODEL), url)
        assert process.stderr is not None
        await _a_worker_dies(Client(http, url, DEFAULT_MODEL), process.pid, process.stderr)

    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 7, "a gateway, three servers and their engines"
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive, alive
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health", timeout=2)  # noqa: ASYNC210, S310


async def _policy_evens_out(client: Client) -> None:
    """Put every stream on one instance: a policy that looks at load moves some to the other, tokens untouched."""
    assert (await client.status())["preset"] == "ares"
    order = {"preset": "ares-no-prediction"}
    async with client.http.put(f"{client.url}/admin/v1/preset", json=order) as reply:
        assert reply.status == 200
    prompts = [list(range(1000 + 50 * n, 1400 + 50 * n)) for n in range(4)]
    streams = [client.stream(f"even-{n}", prompt, 400) for n, prompt in enumerate(prompts)]
    for output, _ in streams:
        await output.reach(3)
    for n in range(4):
        await client.migrate(f"even-{n}", "decode-0")

    async def moved() -> list[dict[str, Any]]:
        # It may have evened out the first placement before, the other way round.
        own = [m for m in (await client.status())["migrations"] if m["reason"].startswith("ares-no-prediction")]
        return [m for m in own if m["source"] == "decode-0" and m["outcome"] == "moved"]

    moves = await eventually_found(moved)
    assert moves[0]["target"] == "decode-1"
    for output, _ in streams:  # all of them still bring tokens, moved or not
        await output.reach(len(output.token_ids) + 5)
        assert output.finish_reason is None
    for _, task in streams:
        task.cancel()
    await asyncio.gather(*(task for _, task in streams), return_exceptions=True)
    await client.quiet()


async def _ares(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ares", *arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, problems = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode(), problems.decode()


async def _commands(client: Client, url: str) -> None:
    """`ares status` shows a running request, `ares migrate` moves it."""
    output, task = client.stream("by-hand", list(range(500, 600)), 800)
    await output.reach(3)
    code, shown, _ = await _ares("status", "--json", "--url", url)
    assert code == 0
    status = json.loads(shown)
    assert [i["name"] for i in status["instances"]] == ["prefill-0", "decode-0", "decode-1"]
    row = next(r for r in status["requests"] if r["id"] == "by-hand")
    assert row["movable"]
    target = "decode-1" if row["instance"] == "decode-0" else "decode-0"
    code, shown, problems = await _ares("migrate", "by-hand", "--to", target, "--url", url, "--json")
    assert code == 0, problems
    record = json.loads(shown)
    assert record["outcome"] == "moved"
    assert record["target"] == target
    assert record["pulled_tokens"] > 0
    assert record["stall_s"] > 0
    code, _, problems = await _ares("migrate", "by-hand", "--to", "nowhere", "--url", url)
    assert code == 1
    assert "nowhere" in problems
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.quiet()


async def _a_worker_dies(client: Client, up: int, errors: asyncio.StreamReader) -> None:
    """The stream goes on elsewhere, token for token; its worker is started again, and serves again."""
    async with client.http.put(f"{client.url}/admin/v1/preset", json={"preset": "off"}) as reply:
        assert reply.status == 200
    prompt = list(range(2000, 2200))
    expected = (await client.complete(prompt, LENGTH))["choices"][0]["token_ids"]
    output, task = client.stream("survivor", prompt, LENGTH)
    await output.reach(20)
    row = await client.row("survivor")
    assert row is not None
    name = row["instance"]
    worker = next(p for p in psutil.Process(up).children() if name in p.cmdline())
    before = [worker, *worker.children(recursive=True)]
    worker.kill()
    assert (await task).error is None
    assert output.finish_reason == "length"
    assert output.token_ids == expected

    said: list[str] = []
    while not said or "ready again" not in said[-1]:
        said.append((await asyncio.wait_for(errors.readline(), 180)).decode())
    told = [line for line in said if line.startswith((f"{name} was", f"{name} starts", f"{name} is"))]
    assert [line.split()[1:3] for line in told] == [["was", "killed"], ["starts", "again"], ["is", "ready"]]
    _, alive = psutil.wait_procs(before, timeout=0)
    assert not alive

    async def healthy() -> bool:
        return bool({i["name"]: i["healthy"] for i in (await client.status())["instances"]}[name])

    await eventually_found(healthy)
    # It takes KV from the other again, and goes on with the same tokens.
    output, task = client.stream("again", prompt, LENGTH)
    await output.reach(20)
    row = await client.row("again")
    assert row is not None
    if row["instance"] != name:
        code, record = await client.migrate("again", name)
        assert (code, record["outcome"]) == (200, "moved"), record
    await task
    assert output.token_ids == expected
    await client.quiet()


async def test_commands_without_a_gateway_say_what_to_do() -> None:
    code, _, problems = await _ares("status", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "ares up" in problems
