"""`python -m ares_dev copies`: what warm copies save when an instance is killed, and what they cost until then.

A steady load of greedy streams with long prompts runs. For some time its CPU time a token is measured with copies and
without, in turns; then decode workers get SIGKILL, in turns too, and what each stream waits for its next token is
measured at the client. Every token is compared with those of a run without kills. No prompt is cached from an earlier
stream.
"""

import asyncio
import itertools
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import aiohttp
import typer
from rich.console import Console

from ares.bench import sse, steady
from ares.bench.environment import write
from ares.bench.live import client
from ares.bench.live.client import Observed
from ares.bench.options import DecodeInstances, Dtype, JsonFile, Model, Port
from ares.bench.streams import kv_blocks_used, long_streams
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.signals import signal_as_interrupt
from ares_dev import fork_server
from ares_dev.kills import resumed_after

# The same policies with warm copies, for which the gateway is started, and without.
_PRESETS = {"with": "off", "without": "static-rr"}
_RESUMED = 8
_SETTLED_S = 3.0
_POLL_S = 0.01
_LONGEST_S = 300.0
# Tokens before a kill whose gaps are compared with the wait after it.
_GAPS = 40


async def _use(load: steady.Load, way: str) -> None:
    async with load.http.put(f"{load.url}/admin/v1/preset", json={"preset": _PRESETS[way]}) as reply:
        reply.raise_for_status()


async def _under_way(load: steady.Load, instance: str, least: int, *, copied: bool) -> list[Observed]:
    """Wait until so many streams are under way on an instance, with a warm copy each where `copied` says so."""
    async with asyncio.timeout(_LONGEST_S):
        while True:
            found = await load.streams_under_way(instance, least)
            rows = (await client.gateway_status(load.http, load.url))["requests"]
            have = {row["id"] for row in rows if row["warm_copy"] is not None}
            if not copied or all(seen.name in have for seen in found):
                return found
            await asyncio.sleep(0.05)


# --- what copies cost ---


def _cpu_s(cluster: local.Cluster) -> dict[str, float]:
    """Return the CPU time so far of the decode workers, with all their processes, and of the gateway."""
    import psutil

    groups = {process.popen.pid: process.name.partition("-")[0] for process in cluster.processes}
    spent = dict.fromkeys(groups.values(), 0.0)
    for process in psutil.process_iter():
        try:
            role = groups.get(os.getpgid(process.pid))
            if role is not None:
                spent[role] += sum(process.cpu_times()[:2])
        except (psutil.Error, ProcessLookupError):  # it has ended meanwhile
            continue
    return spent


def _tokens(load: steady.Load) -> int:
    return load.tokens + sum(len(seen.tokens) for seen in load.running.values())


async def _window(load: steady.Load, cluster: local.Cluster, way: str, seconds: float) -> dict[str, Any]:
    """Measure for some seconds with copies or without."""
    await _use(load, way)
    await asyncio.sleep(_SETTLED_S)  # of the streams that run, the first copies are made
    copied = await _counter(load, "ares_warm_copies_total")
    size = await _counter(load, "ares_warm_copied_bytes_total")
    cpu, tokens, began = _cpu_s(cluster), _tokens(load), time.monotonic()
    await asyncio.sleep(seconds)
    spent, made, took = _cpu_s(cluster), _tokens(load) - tokens, time.monotonic() - began
    return {
        "way": way,
        "tokens": made,
        "seconds": round(took, 2),
        "copies": await _counter(load, "ares_warm_copies_total") - copied,
        "bytes": await _counter(load, "ares_warm_copied_bytes_total") - size,
        **{f"{role}_cpu_ms_per_token": 1e3 * (spent[role] - cpu[role]) / max(1, made) for role in spent},
    }


async def _counter(load: steady.Load, name: str, **labels: str) -> float:
    """Return a counter of the gateway, summed over its labels but those given."""
    async with load.http.get(f"{load.url}/metrics") as reply:
        lines = (await reply.text()).splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = (line.rsplit(" ", 1) for line in lines if line.startswith((name + " ", name + "{")))
    return sum(float(value) for key, value in found if all(part in key for part in wanted))


# --- what they save ---


def _gap_s(seen: Observed, until: float) -> float:
    """Return the median time between two tokens of a stream before a moment."""
    times = [at for at in seen.times_s if at <= until][-_GAPS:]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


async def _kill(
    load: steady.Load, cluster: local.Cluster, process: local.ManagedProcess, way: str, least: int
) -> dict[str, Any]:
    """Kill a decode worker, and wait until its streams have resumed and it is back."""
    (name,) = process.instances
    await _use(load, way)
    affected = await _under_way(load, name, least, copied=way == "with")
    machine = steady.machine_load()
    cached = await _counter(load, "ares_resumed_cached_tokens_total")
    os.killpg(process.popen.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    detecting = asyncio.create_task(
        steady.wait_for(load.http, load.url, name, lambda seen: not seen.get("healthy"), _POLL_S)
    )
    async with asyncio.timeout(_LONGEST_S):
        while any(  # noqa: ASYNC110 - nothing announces it
            seen.name in load.running and sum(at > killed_at for at in seen.times_s) < _RESUMED for seen in affected
        ):
            await asyncio.sleep(0.02)
    detected_s = await detecting - killed_at
    waits = [(resumed_after(seen.times_s, killed_at), _gap_s(seen, killed_at)) for seen in affected]
    await asyncio.to_thread(process.popen.wait)
    await steady.restart_worker(load.http, load.url, cluster, process)
    return {
        "way": way,
        "instance": name,
        "streams": len(affected),
        "detected_s": round(detected_s, 4),
        "resumed_s": [round(wait, 4) for wait, _ in waits if wait is not None],
        "gaps_s": [round(gap, 4) for _, gap in waits],
        "gaps_after_detection": [round((wait - detected_s) / gap, 2) for wait, gap in waits if wait is not None],
        "cached_tokens_a_stream": (await _counter(load, "ares_resumed_cached_tokens_total") - cached) / len(affected),
        "load_average": machine,
    }


async def measure(
    cluster: local.Cluster, *, kills: int, windows: int, window_s: float, streams: int, prompt_tokens: int, tokens: int
) -> dict[str, Any]:
    """Measure cost, then kills, each so often with and so often without copies."""
    url, model = cluster.url, cluster.settings.model
    decode = [process for process in cluster.workers if process.name.startswith("decode")]
    planned = long_streams(streams, prompt_tokens, tokens)
    cost: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    async with sse.session() as http:
        expected = await steady.baseline_outputs(http, url, model, planned)
        load = steady.Load(http, url, model, planned, expected, salted=True)
        load.start(streams)
        try:
            for way in itertools.islice(itertools.cycle(_PRESETS), 2 * windows):
                row = await _window(load, cluster, way, window_s)
                cost.append(row)
            for number in range(2 * kills):
                way = list(_PRESETS)[number % 2]
                rows.append(await _kill(load, cluster, decode[number // 2 % len(decode)], way, max(1, streams // 4)))
        except (aiohttp.ClientError, local.ClusterError, TimeoutError) as error:
            broken.append(str(error) or repr(error))  # the figures until then are still reported
        await load.stop()
        await client.wait_until_idle(http, url)
        left = sum(kv_blocks_used(await client.gateway_status(http, url)).values())
    return {
        "broken_off": broken,
        **load.summary(),
        "blocks_left": left,
        "summary": {way: _summary(way, cost, rows) for way in _PRESETS},
        "cost": cost,
        "kills": rows,
    }


def _summary(way: str, cost: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    windows = [row for row in cost if row["way"] == way]
    killed = [row for row in rows if row["way"] == way]
    cpu = [row["decode_cpu_ms_per_token"] for row in windows]
    gaps = sorted(gap for row in killed for gap in row["gaps_after_detection"])
    return {
        "resumed": steady.latency_summary([wait for row in killed for wait in row["resumed_s"]]),
        "detected": steady.latency_summary([row["detected_s"] for row in killed]),
        "gap": steady.latency_summary([gap for row in killed for gap in row["gaps_s"]]),
        "gaps_after_detection_p50": round(statistics.median(gaps), 2) if gaps else None,
        "streams_that_did_not_resume": sum(row["streams"] - len(row["resumed_s"]) for row in killed),
        "decode_cpu_ms_per_token": round(statistics.median(cpu), 4) if cpu else None,
    }


def command(
    kills: Annotated[int, typer.Option(min=0, help="Decode workers to kill, with copies and without.")] = 6,
    windows: Annotated[int, typer.Option(min=0, help="Measurements of the cost, with copies and without.")] = 6,
    window: Annotated[float, typer.Option(min=0.1, help="Seconds of each.")] = 10.0,
    streams: Annotated[int, typer.Option(min=2, help="Concurrent streams.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1500,
    tokens: Annotated[int, typer.Option(min=80, help="Output tokens of a stream.")] = 400,
    link_bytes: Annotated[float, typer.Option(min=1, help="Bytes per second that copies may transfer.")] = 1e8,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a KV block: vLLM's --block-size.")] = 32,
    decode: DecodeInstances = 2,
    dtype: Dtype = "float32",
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
) -> None:
    """Measure warm copies: waits after a kill, and CPU time a token; status 1 where a request or token was lost."""
    signal_as_interrupt()
    flags = ("--dtype", dtype, "--block-size", str(block))
    copies = ("--set", f"copies.link_bytes_s={link_bytes}", "--set", "copies.memory_share=0.8")
    settings = local.ClusterSettings(
        model=model,
        decode=decode,
        preset=_PRESETS["with"],
        port=port,
        gateway_flags=copies,
        vllm_flags=tuple(local_flags(list(flags))),
        worker_module="ares_dev.forked_engine",
    )
    before = steady.machine_load()
    with (
        tempfile.TemporaryDirectory() as folder,
        fork_server.running(Path(folder) / "fork-server.log", os.environ) as variables,
        mock.patch.dict(os.environ, variables),
        local.running(settings, Console(stderr=True)) as cluster,
    ):
        figures = asyncio.run(
            measure(
                cluster,
                kills=kills,
                windows=windows,
                window_s=window,
                streams=streams,
                prompt_tokens=prompt,
                tokens=tokens,
            )
        )
    result = {
        **steady.result_header("copies", model, None, dtype, decode),
        "streams_at_a_time": streams,
        "tokens_of_a_prompt": prompt,
        "tokens_of_a_stream": tokens,
        "block_tokens": block,
        "link_bytes_s": link_bytes,
        "load_average": {"before": before, "after": steady.machine_load()},
        **figures,
    }
    _show(figures)
    write(result, json_file)
    if steady.lost(figures) or any(one["streams_that_did_not_resume"] for one in figures["summary"].values()):
        raise typer.Exit(1)


def _show(figures: dict[str, Any]) -> None:
    table = tables.table("warm copies", "resumed P50 ms", "detected", "gap", "gaps", "CPU ms a token", title="")
    for way, one in figures["summary"].items():
        times = [f"{one[name]['p50_ms']:.0f}" if one[name]["count"] else "" for name in ("resumed", "detected", "gap")]
        rest = [one["gaps_after_detection_p50"], one["decode_cpu_ms_per_token"]]
        table.add_row(way, *times, *("" if each is None else f"{each:.3g}" for each in rest))
    tables.show(table)
    steady.show_losses(figures)
