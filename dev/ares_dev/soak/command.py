"""`python -m ares_dev soak`: mixed traffic and moves for hours; then leaks, lost requests and what is left."""

import asyncio
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from ares import extras
from ares.bench import sse, steady
from ares.bench.environment import write
from ares.bench.live import client
from ares.bench.options import DecodeInstances, Dtype, JsonFile, Model, Port, Simulate
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.progress import progress_display
from ares.terminal.signals import signal_as_interrupt
from ares_dev.moves import keep_moving
from ares_dev.soak import growth, samples
from ares_dev.soak.cases import cases, reference_outputs
from ares_dev.soak.samples import Sample
from ares_dev.soak.traffic import Traffic, TrafficCounts

_MODES = ("stop_and_copy", "pre_copy")
# A stream is moved again after this many tokens; the status is read this often.
_BETWEEN = 16
_PAUSE_S = 0.5
# Blocks and pins are free by then, also those of a lease that must expire (30 s).
_SETTLED_S = 45.0
_LEFT = ("kv_blocks_used", "pinned", "running", "waiting", "sessions")
_NOT_COUNTED = (
    "Registered memory, remote engines, handshakes, pulls and leases are counted where the engine's one worker runs in "
    "the scheduler's process (CPUs); what NIXL and UCX allocate behind them shows in the memory only."
)
# Errors that end a soak early; the figures until then are still reported.
_Broken = (local.ClusterError, aiohttp.ClientError, psutil.Error, OSError, TimeoutError, KeyError)


async def _sample_when_idle(http: aiohttp.ClientSession, cluster: local.Cluster, start: float) -> Sample:
    """Wait until nothing is left of the requests, or for long enough, and take a sample."""
    await client.wait_until_idle(http, cluster.url)
    deadline = time.monotonic() + _SETTLED_S
    while True:
        sample = await samples.take_sample(http, cluster, start, idle=True)
        if not _left(sample) or time.monotonic() > deadline:
            return sample
        await asyncio.sleep(0.5)


def _left(sample: Sample) -> dict[str, float]:
    return {name: value for name, value in sample.values.items() if value and name.rpartition("/")[2] in _LEFT}


async def soak(
    cluster: local.Cluster, seconds: float, users: int, interval_s: float, lull_s: float, console: Console
) -> tuple[dict[str, Any], list[Sample]]:
    """Run traffic and moves for so long; return the figures, and all samples."""
    url, model = cluster.url, cluster.settings.model
    moves: Counter[str] = Counter()
    broken: list[str] = []
    # Idle connections would be counted at the gateway.
    async with sse.session(silence_s=120.0, keep_connections=False) as http:
        asked = cases()
        await client.wait_until_idle(http, url)
        traffic = Traffic(http, url, model, asked, await reference_outputs(http, url, model, asked))
        start = time.monotonic()
        taken = [await _sample_when_idle(http, cluster, start)]
        before = after = await samples.engine_faults(http, cluster)
        enough = asyncio.Event()
        moving = keep_moving(http, url, moves, enough, modes=_MODES, between=_BETWEEN, pause_s=_PAUSE_S)
        mover = asyncio.create_task(moving)
        traffic.start(users)
        try:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            with progress_display(console, *columns) as bar:
                task = bar.add_task("soak", total=seconds)
                rested = start
                while (now := time.monotonic() - start) < seconds and not mover.done():
                    if time.monotonic() - rested > lull_s:
                        await traffic.pause()
                        taken.append(await _sample_when_idle(http, cluster, start))
                        traffic.resume()
                        rested = time.monotonic()
                    else:
                        taken.append(await samples.take_sample(http, cluster, start, idle=False))
                    cluster.check()
                    bar.update(task, completed=now, description=_description(traffic.counts, moves))
                    await asyncio.sleep(interval_s)
            await traffic.stop()
            enough.set()
            await mover
            taken.append(await _sample_when_idle(http, cluster, start))
            after = await samples.engine_faults(http, cluster)
        except _Broken as error:
            broken.append(repr(error))
        finally:
            mover.cancel()
            await asyncio.gather(mover, return_exceptions=True)
            await traffic.leave()
    half = taken[-1].at_s / 2
    figures = {
        "seconds": round(taken[-1].at_s, 1),
        "judged_from_s": round(half, 1),
        "broken_off": broken,
        **_summary(traffic.counts),
        "moves": dict(moves),
        "engine_faults": {name: after[name] - before[name] for name in after},
        "left_at_the_end": _left(taken[-1]),
        "series": growth.judge_growth(taken, half),
    }
    return figures, taken


def _description(counts: TrafficCounts, moves: Counter[str]) -> str:
    wrong = sum(counts.outputs.values()) - counts.outputs["right"]
    return f"{sum(counts.done.values())} requests, {moves['moved']} moves, {counts.failed} failed, {wrong} wrong"


def _summary(counts: TrafficCounts) -> dict[str, Any]:
    return {
        "requests": dict(counts.done),
        "failed": counts.failed,
        "failures": list(counts.failures),
        "output_tokens": counts.tokens,
        "tokens_checked": counts.tokens_checked,
        "outputs": dict(counts.outputs),
        "differences": list(counts.differences),
    }


def violations(figures: dict[str, Any]) -> list[str]:
    """Return what is wrong, one sentence each; nothing where all is well."""
    found = [f"broken off: {why}" for why in figures["broken_off"]]
    found += [f"{count} outputs {verdict}" for verdict, count in figures["outputs"].items() if verdict != "right"]
    if figures["failed"]:
        found.append(f"{figures['failed']} requests failed")
    if expired := sum(count for name, count in figures["engine_faults"].items() if "expired" in name):
        found.append(f"{expired:.0f} leases expired")
    found += [f"left at the end: {name} = {value:g}" for name, value in figures["left_at_the_end"].items()]
    found += [
        f"{row['series']} grows: {row['growth']:g}, limit {row['limit']:g}"
        for row in figures["series"]
        if row["flat"] is False
    ]
    return found


def command(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to run.")] = 30.0,
    users: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 8,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two samples of every process.")] = 5.0,
    lull: Annotated[
        float, typer.Option(min=1, help="Seconds between two pauses of all users, for a sample of the idle cluster.")
    ] = 90.0,
    decode: DecodeInstances = 2,
    preset: Annotated[str, typer.Option(help="Policy preset, in addition to the moves by command.")] = "ares",
    processes: Annotated[int, typer.Option(min=1, help="Processes of the gateway.")] = 1,
    dtype: Dtype = "float32",
    simulate: Simulate = None,
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the picture.")] = None,
) -> None:
    """Run mixed traffic and moves; check tokens, leaks and leases, and what is left; status 1 if anything is wrong."""
    if report is not None:
        extras.require("matplotlib")
    signal_as_interrupt()
    settings = steady.cluster_settings(model, decode, port, simulate, dtype, preset)
    settings = replace(settings, gateway_flags=("--processes", str(processes)))
    console = Console(stderr=True)
    before = steady.machine_load()
    with local.running(settings, console) as cluster:
        figures, taken = asyncio.run(soak(cluster, 60 * minutes, users, interval, lull, console))
    wrong = violations(figures)
    result = {
        **steady.result_header("soak", model, simulate, dtype, decode),
        "preset": preset,
        "gateway_processes": processes,
        "users": users,
        "load_average": {"before": before, "after": steady.machine_load()},
        "violations": wrong,
        "not_counted": _NOT_COUNTED,
        **figures,
        "samples": samples.columns(taken),
    }
    _show(figures, wrong)
    if report is not None:
        from ares_dev.soak import plots

        report.mkdir(parents=True, exist_ok=True)
        plots.draw(taken, report / "soak.svg")
    write(result, json_file)
    if wrong:
        raise typer.Exit(1)


def _show(figures: dict[str, Any], wrong: list[str]) -> None:
    columns = ("median", "growth", "limit", "per hour", "flat")
    table = tables.table("series", *columns, title="growth in the second half")
    for row in figures["series"]:
        if row["flat"] is not None and (row["median"] or row["growth"]):
            cells = [f"{row[name]:g}" for name in ("median", "growth", "limit", "growth_per_hour")]
            table.add_row(row["series"], *cells, "yes" if row["flat"] else "NO")
    console = Console()
    tables.show(table)
    console.print(
        f"{sum(figures['requests'].values())} requests, {figures['moves'].get('moved', 0)} moves, "
        f"{figures['tokens_checked']} tokens checked in {figures['seconds']:.0f} s"
    )
    for line in wrong or ["nothing is wrong"]:
        console.print(line, style="bold red" if wrong else "green", markup=False)
