"""`ares bench simulated`: many concurrent streams through one gateway over mock engines.

Every token of every stream is checked afterwards: the output of a mock engine is a function of the prompt.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from ares import extras
from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Port
from ares.bench.percentiles import milliseconds
from ares.local_cluster import cluster as local
from ares.mock_engine import model as simulated
from ares.mock_engine.model import MockModel
from ares.models import resolve as models
from ares.models.resolve import DEFAULT_MODEL
from ares.protocol.fields import COUNTERS_ROUTE, GENERATE_ROUTE
from ares.terminal import tables
from ares.terminal.http_client import open_direct
from ares.terminal.signals import signal_as_interrupt

# Time limit of a run, in addition to the time that its tokens take.
_GRACE_S = 120.0
_IDLE_TIMEOUT_S = 30.0


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
    port: Port = 8013,
    json_file: JsonFile = None,
) -> None:
    """Measure one gateway, or none, in front of many mock engines: tokens a second, CPU, memory, gaps, errors."""
    extras.require("psutil")
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
    import psutil

    prompts = [
        [written.ids[(n * 7 + k) % len(written.ids)] for k in range(plan.prompt_tokens)] for n in range(plan.streams)
    ]
    if through_gateway:
        ports = [_port(cluster.url)]
    else:
        decoding = [managed for managed in cluster.workers if managed.name != "prefill"]
        ports = [_port(url) for managed in decoding for url in managed.instances.values()]
    requests = [_request(plan, prompt, through_gateway=through_gateway) for prompt in prompts]
    parts = {managed.name: psutil.Process(managed.popen.pid) for managed in cluster.processes}
    parts["client"] = psutil.Process()
    before = {name: sum(process.cpu_times()[:2]) for name, process in parts.items()}
    psutil.cpu_percent()
    lag_before = sum(c["lag_s"] for c in _counters(cluster))
    began = time.perf_counter()
    replies = uvloop.run(sse.read_at_once(requests, ports, _GRACE_S + plan.tokens))
    elapsed = time.perf_counter() - began
    spent = {name: sum(process.cpu_times()[:2]) - before[name] for name, process in parts.items()}
    machine = psutil.cpu_percent()
    arrivals = [_arrivals(reply) for reply in replies]
    outputs = [_tokens(reply) for reply in replies]
    wrong = sum(
        output != written.continuation(prompt, plan.tokens) for prompt, output in zip(prompts, outputs, strict=True)
    )
    total = sum(map(len, outputs))
    gaps = [b - a for times, _ in arrivals for a, b in itertools.pairwise(times)]
    first = [times[0] - reply.started for reply, (times, _) in zip(replies, arrivals, strict=True) if times]
    return {
        "streams": len(replies),
        "wrong_or_broken_streams": wrong,
        "tokens": total,
        "seconds": round(elapsed, 2),
        "tokens_per_s": round(total / elapsed),
        "tokens_per_s_while_all_ran": _steady(arrivals),
        "first_token_ms": milliseconds(first, 50, 99, 100, digits=2),
        "gap_ms": milliseconds(gaps, 50, 99, 100, digits=2),
        "cpu_percent_of_one_core": {name: round(100 * used / elapsed, 1) for name, used in spent.items()},
        "cpu_us_per_token": {name: round(1e6 * used / max(1, total), 2) for name, used in spent.items()},
        "memory_mb": {name: round(process.memory_info().rss / 2**20) for name, process in parts.items()},
        "left_behind": _left_behind(cluster),
        "engines_lag_s": round(sum(c["lag_s"] for c in _counters(cluster)) - lag_before, 2),
        "machine_cpu_percent": round(machine),
    }


def _tokens(reply: sse.RawReply) -> list[int]:
    """Return the tokens of a stream; none where an event holds no choice, as an error does."""
    chunks = list(reply.chunks())
    return [token for chunk in chunks for token in chunk.tokens] if all(chunk.choices for chunk in chunks) else []


def _arrivals(reply: sse.RawReply) -> tuple[list[float], list[int]]:
    """Return when events with tokens came, and how many each time."""
    counts = [data.count(sse.EVENT) for data in reply.data]
    found = [(moment, count) for moment, count in zip(reply.times, counts, strict=True) if count]
    return [moment for moment, _ in found], [count for _, count in found]


def _request(plan: _Plan, prompt: list[int], *, through_gateway: bool) -> bytes:
    sampling = {"max_tokens": plan.tokens, "ignore_eos": True}
    body: dict[str, Any]
    if through_gateway:
        path = "/v1/completions"
        body = {"model": plan.model, "prompt": prompt, "return_token_ids": True, **sampling}
    else:
        path = GENERATE_ROUTE
        body = {"token_ids": prompt, "sampling_params": sampling}
    return sse.request_bytes(path, {**body, "stream": True})


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _counters(cluster: local.Cluster) -> Iterator[dict[str, Any]]:
    for managed in cluster.workers:
        for url in managed.instances.values():
            with open_direct(f"{url}{COUNTERS_ROUTE}", timeout=10) as reply:
                yield msgspec.json.decode(reply.read())


def _left_behind(cluster: local.Cluster) -> int:
    """Return the KV blocks, pins and requests that the engines still have a while after the last stream has ended."""
    deadline = time.monotonic() + _IDLE_TIMEOUT_S
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
            ", ".join(f"{managed} {percent:.0f}" for managed, percent in run["cpu_percent_of_one_core"].items()),
        )
    return table
