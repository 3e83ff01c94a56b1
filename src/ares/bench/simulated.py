"""`ares bench simulated`: many concurrent streams through one gateway over simulated engines.

Every token of every stream is checked afterwards: what simulated engines write is a function of the prompt.
"""

import asyncio
import itertools
import statistics
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import psutil
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from ares.bench.environment import describe, write
from ares.local_cluster import cluster as local
from ares.mock_engine import model as simulated
from ares.mock_engine.model import MockModel
from ares.models import resolve as models
from ares.models.resolve import DEFAULT_MODEL
from ares.protocol.fields import COUNTERS_ROUTE, GENERATE_ROUTE
from ares.terminal import tables
from ares.terminal.http_client import open_direct
from ares.terminal.signals import signal_as_interrupt

_EVENT = b"data: {"
_END = b"0\r\n\r\n"
# Longest run, beyond what the tokens take.
_PATIENCE_S = 120.0
_REST_S = 30.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """The settings of a run."""

    profile: str
    model: str
    prefill: int
    decode: int
    streams: int
    prompt_tokens: int
    tokens: int
    speed: float
    preset: str


class _Reader(asyncio.Protocol):
    """Keeps what one stream brings and when, for next to no CPU; it is read and checked afterwards."""

    def __init__(self, request: bytes, go: "asyncio.Future[None]") -> None:
        self.finished: asyncio.Future[None] = go.get_loop().create_future()
        self.data: list[bytes] = []
        self.times = array("d")
        self.started = 0.0
        self._request = request
        go.add_done_callback(self._send)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def _send(self, _: "asyncio.Future[None]") -> None:
        self.started = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.data.append(data)
        self.times.append(time.perf_counter())
        if data.endswith(_END):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def arrivals(self) -> tuple[list[float], list[int]]:
        """Return when events came, and how many each time."""
        counts = [data.count(_EVENT) for data in self.data]
        found = [(moment, count) for moment, count in zip(self.times, counts, strict=True) if count]
        return [moment for moment, _ in found], [count for _, count in found]

    def tokens(self) -> list[int]:
        """Return the tokens; what is no stream of tokens is an empty list."""
        found: list[int] = []
        for line in b"".join(self.data).split(b"\n"):
            if line.startswith(_EVENT):
                choices = msgspec.json.decode(line[len(_EVENT) - 1 :]).get("choices")
                if not choices:  # an error
                    return []
                found += choices[0].get("token_ids") or []
        return found


def command(
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 1000,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill instances.")] = 4,
    decode: Annotated[int, typer.Option(min=1, help="Decode instances.")] = 60,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a stream.")] = 400,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 100,
    speed: Annotated[float, typer.Option(min=0.01, help="How much faster than real time the engines are.")] = 1.0,
    profile: Annotated[str, typer.Option(help="Profile of the engines.")] = "qwen3-32b-2xrtxpro6000",
    preset: Annotated[str, typer.Option(help="Policy preset of the gateway.")] = "off",
    model: Annotated[str, typer.Option(help="Hugging Face id or folder: its tokenizer is read.")] = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(help="Port of the endpoint.")] = 8013,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure one gateway, or none, before many simulated engines: tokens a second, CPU, memory, gaps, errors."""
    signal_as_interrupt()
    console = Console()
    plan = _Plan(profile, model, prefill, decode, streams, prompt_tokens, tokens, speed, preset)
    folder = models.resolve(model, weights=False)
    settings = local.ClusterSettings(
        model=model,
        prefill=prefill,
        decode=decode,
        port=port,
        preset=preset,
        simulate=profile,
        vllm_flags=("--speed", str(speed)),
    )
    written = simulated.load(folder)
    with local.running(settings) as cluster:
        console.print("without the gateway", style="dim")
        direct = _measure(plan, cluster, written, through_gateway=False)
        console.print("through the gateway", style="dim")
        gateway = _measure(plan, cluster, written, through_gateway=True)
    result = {
        "benchmark": "simulated",
        "note": "engines, gateway and client share the machine; the engines compute nothing",
        "settings": asdict(plan),
        **describe(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "direct": direct,
        "gateway": gateway,
    }
    tables.show(_table(plan, {"no gateway": direct, "gateway": gateway}))
    write(msgspec.to_builtins(result), json_file)


def _measure(plan: _Plan, cluster: local.Cluster, written: MockModel, *, through_gateway: bool) -> dict[str, Any]:
    prompts = [
        [written.ids[(n * 7 + k) % len(written.ids)] for k in range(plan.prompt_tokens)] for n in range(plan.streams)
    ]
    if through_gateway:
        ports = [_port(cluster.url)]
    else:
        decoding = [part for part in cluster.workers if part.name != "prefill"]
        ports = [_port(url) for part in decoding for url in part.instances.values()]
    requests = [_request(plan, prompt, through_gateway=through_gateway) for prompt in prompts]
    parts = {part.name: psutil.Process(part.process.pid) for part in cluster.parts}
    parts["client"] = psutil.Process()
    before = {name: sum(process.cpu_times()[:2]) for name, process in parts.items()}
    psutil.cpu_percent()
    lag_before = sum(c["lag_s"] for c in _counters(cluster))
    began = time.perf_counter()
    readers: list[_Reader] = uvloop.run(_read(requests, ports, plan))
    elapsed = time.perf_counter() - began
    spent = {name: sum(process.cpu_times()[:2]) - before[name] for name, process in parts.items()}
    machine = psutil.cpu_percent()
    arrivals = [reader.arrivals() for reader in readers]
    outputs = [reader.tokens() for reader in readers]
    wrong = sum(
        output != written.continuation(prompt, plan.tokens) for prompt, output in zip(prompts, outputs, strict=True)
    )
    total = sum(map(len, outputs))
    gaps = [b - a for times, _ in arrivals for a, b in itertools.pairwise(times)]
    first = [times[0] - reader.started for reader, (times, _) in zip(readers, arrivals, strict=True) if times]
    return {
        "streams": len(readers),
        "wrong_or_broken_streams": wrong,
        "tokens": total,
        "seconds": round(elapsed, 2),
        "tokens_per_s": round(total / elapsed),
        "tokens_per_s_while_all_ran": _steady(arrivals),
        "first_token_ms": _percentiles(first),
        "gap_ms": _percentiles(gaps),
        "cpu_percent_of_one_core": {name: round(100 * used / elapsed, 1) for name, used in spent.items()},
        "cpu_us_per_token": {name: round(1e6 * used / max(1, total), 2) for name, used in spent.items()},
        "memory_mb": {name: round(process.memory_info().rss / 2**20) for name, process in parts.items()},
        "left_behind": _left_behind(cluster),
        "engines_lag_s": round(sum(c["lag_s"] for c in _counters(cluster)) - lag_before, 2),
        "machine_cpu_percent": round(machine),
    }


async def _read(requests: list[bytes], ports: list[int], plan: _Plan) -> list[_Reader]:
    loop = asyncio.get_running_loop()
    go: asyncio.Future[None] = loop.create_future()
    readers: list[_Reader] = []
    for n, request in enumerate(requests):
        reader = _Reader(request, go)
        await loop.create_connection(lambda reader=reader: reader, "127.0.0.1", ports[n % len(ports)])  # type: ignore[misc]
        readers.append(reader)
    # All are connected before the first one asks.
    go.set_result(None)
    async with asyncio.timeout(_PATIENCE_S + plan.tokens):
        await asyncio.gather(*(reader.finished for reader in readers))
    return readers


def _request(plan: _Plan, prompt: list[int], *, through_gateway: bool) -> bytes:
    sampling = {"max_tokens": plan.tokens, "ignore_eos": True}
    body: dict[str, Any]
    if through_gateway:
        path = "/v1/completions"
        body = {"model": plan.model, "prompt": prompt, "return_token_ids": True, **sampling}
    else:
        path = GENERATE_ROUTE
        body = {"token_ids": prompt, "sampling_params": sampling}
    data = msgspec.json.encode({**body, "stream": True})
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _counters(cluster: local.Cluster) -> Iterator[dict[str, Any]]:
    for part in cluster.workers:
        for url in part.instances.values():
            with open_direct(f"{url}{COUNTERS_ROUTE}", timeout=10) as reply:
                yield msgspec.json.decode(reply.read())


def _left_behind(cluster: local.Cluster) -> int:
    """Return the KV blocks, pins and requests that the engines still have a while after the last stream has ended."""
    deadline = time.monotonic() + _REST_S
    while True:
        left = sum(c["kv_blocks_used"] + c["pinned"] + c["running"] + c["waiting"] for c in _counters(cluster))
        if not left or time.monotonic() > deadline:
            return int(left)
        time.sleep(0.2)


def _steady(arrivals: list[tuple[list[float], list[int]]]) -> int | None:
    """Return the tokens a second between the last stream's first token and the first stream's last one."""
    begin = max((times[0] for times, _ in arrivals if times), default=0.0)
    end = min((times[-1] for times, _ in arrivals if times), default=0.0)
    if end - begin < 1.0:
        return None
    events = sum(
        count
        for times, counts in arrivals
        for moment, count in zip(times, counts, strict=True)
        if begin <= moment < end
    )
    return round(events / (end - begin))


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(1000 * cuts[49], 2), "p99": round(1000 * cuts[98], 2), "max": round(1000 * max(seconds), 1)}


def _table(plan: _Plan, runs: dict[str, dict[str, Any]]) -> Table:
    title = f"{plan.streams} streams of {plan.tokens} tokens on {plan.prefill + plan.decode} instances"
    columns = ("tokens/s", "all running", "wrong", "TTFT p50/p99 ms", "gap p50/p99 ms", "CPU % of a core")
    table = tables.table("", *columns, title=title)
    for name, run in runs.items():
        first, gap = run["first_token_ms"], run["gap_ms"]
        table.add_row(
            name,
            str(run["tokens_per_s"]),
            str(run["tokens_per_s_while_all_ran"]),
            str(run["wrong_or_broken_streams"]),
            f"{first.get('p50')} / {first.get('p99')}",
            f"{gap.get('p50')} / {gap.get('p99')}",
            ", ".join(f"{part} {percent:.0f}" for part, percent in run["cpu_percent_of_one_core"].items()),
        )
    return table
