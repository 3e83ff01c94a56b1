"""`python -m ares_dev soak`: mixed traffic and moves for hours; what grows, what is lost, what is left."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from ares import extras
from ares.bench import steady
from ares.bench.environment import write
from ares.bench.live import client
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.progress import progress_display
from ares.terminal.signals import signal_as_interrupt
from ares_dev.moves import keep_moving
from ares_dev.soak import judge, samples
from ares_dev.soak.cases import cases, known
from ares_dev.soak.samples import Sample
from ares_dev.soak.traffic import Tally, Traffic

_MODES = ("stop_and_copy", "pre_copy")
# A stream is moved again after this many tokens; who moves looks this often.
_BETWEEN = 16
_PAUSE_S = 0.5
# Blocks, pins and leases are back by then, also those of a lease that must expire (30 s).
_SETTLED_S = 45.0
_LEFT = ("kv_blocks_used", "pinned", "running", "waiting", "sessions")
_NOT_COUNTED = (
    "Registered memory, remote engines, handshakes, pulls and leases are counted where the engine's one worker runs in "
    "the scheduler's process (CPUs); what NIXL and UCX allocate behind them shows in the memory only."
)
# What may end a soak before its time; what was seen until then is still told.
_Broken = (local.ClusterError, aiohttp.ClientError, psutil.Error, OSError, TimeoutError, KeyError)


def _session() -> aiohttp.ClientSession:
    """Make an HTTP client that keeps no connection: idle ones would be counted at the gateway."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True))


async def _at_rest(http: aiohttp.ClientSession, cluster: local.Cluster, start: float) -> Sample:
    """Wait until nothing is left of the requests that ran, and look; or look at what is left after all."""
    await client.quiet(http, cluster.url)
    deadline = time.monotonic() + _SETTLED_S
    while True:
        sample = await samples.take(http, cluster, start, resting=True)
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
    async with _session() as http:
        asked = cases()
        await client.quiet(http, url)
        traffic = Traffic(http, url, model, asked, await known(http, url, model, asked))
        start = time.monotonic()
        taken = [await _at_rest(http, cluster, start)]
        before = after = await samples.mishaps(http, cluster)
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
                        taken.append(await _at_rest(http, cluster, start))
                        traffic.resume()
                        rested = time.monotonic()
                    else:
                        taken.append(await samples.take(http, cluster, start, resting=False))
                    cluster.check()
                    bar.update(task, completed=now, description=_described(traffic.tally, moves))
                    await asyncio.sleep(interval_s)
            await traffic.stop()
            enough.set()
            await mover
            taken.append(await _at_rest(http, cluster, start))
            after = await samples.mishaps(http, cluster)
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
        **_summary(traffic.tally),
        "moves": dict(moves),
        "mishaps": {name: after[name] - before[name] for name in after},
        "left_at_the_end": _left(taken[-1]),
        "series": judge.verdicts(taken, half),
    }
    return figures, taken


def _described(tally: Tally, moves: Counter[str]) -> str:
    wrong = sum(tally.outputs.values()) - tally.outputs["right"]
    return f"{sum(tally.done.values())} requests, {moves['moved']} moves, {tally.failed} failed, {wrong} wrong"


def _summary(tally: Tally) -> dict[str, Any]:
    return {
        "requests": dict(tally.done),
        "failed": tally.failed,
        "failures": list(tally.failures),
        "output_tokens": tally.tokens,
        "tokens_checked": tally.tokens_checked,
        "outputs": dict(tally.outputs),
        "differences": list(tally.differences),
    }


def unmet(figures: dict[str, Any]) -> list[str]:
    """Return what a soak promises and this one did not keep, in words; nothing where all is well."""
    found = [f"broken off: {why}" for why in figures["broken_off"]]
    found += [f"{count} outputs {verdict}" for verdict, count in figures["outputs"].items() if verdict != "right"]
    if figures["failed"]:
        found.append(f"{figures['failed']} requests failed")
    if expired := sum(count for name, count in figures["mishaps"].items() if "expired" in name):
        found.append(f"{expired:.0f} leases expired")
    found += [f"left at the end: {name} = {value:g}" for name, value in figures["left_at_the_end"].items()]
    found += [
        f"{row['series']} grows: {row['growth']:g}, bound {row['bound']:g}"
        for row in figures["series"]
        if row["flat"] is False
    ]
    return found


def command(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    users: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at every process.")] = 5.0,
    lull: Annotated[float, typer.Option(min=1, help="Seconds between two pauses, for a look at rest.")] = 90.0,
    decode: Annotated[int, typer.Option(min=2, help="Decode instances, beside one prefill instance.")] = 2,
    preset: Annotated[str, typer.Option(help="Policy preset that places and moves beside the moves by command.")] = (
        "ares"
    ),
    dtype: Annotated[str, typer.Option(help="float32 makes sums independent of the batch, so tokens must agree.")] = (
        "float32"
    ),
    simulate: Annotated[str | None, typer.Option(help="Soak simulated engines of this profile instead.")] = None,
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of the model.")] = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(help="Port of the endpoint.")] = 8010,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the picture.")] = None,
) -> None:
    """Run mixed traffic and moves: tokens, leaks, leases, what is left at the end; status 1 where anything is wrong."""
    if report is not None:
        extras.require("matplotlib")
    signal_as_interrupt()
    settings = steady.engines(model, decode, port, simulate, dtype, preset)
    console = Console(stderr=True)
    before = steady.machine_load()
    with local.running(settings, console) as cluster:
        figures, taken = asyncio.run(soak(cluster, 60 * minutes, users, interval, lull, console))
    wrong = unmet(figures)
    result = {
        **steady.described("soak", model, simulate, dtype, decode),
        "preset": preset,
        "users": users,
        "load_average": {"before": before, "after": steady.machine_load()},
        "verdict": wrong or "everything held",
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
    columns = ("median", "growth", "bound", "per hour", "flat")
    table = tables.table("series", *columns, title="growth in the second half")
    for row in figures["series"]:
        if row["flat"] is not None and (row["median"] or row["growth"]):
            cells = [f"{row[name]:g}" for name in ("median", "growth", "bound", "growth_per_hour")]
            table.add_row(row["series"], *cells, "yes" if row["flat"] else "NO")
    console = Console()
    tables.show(table)
    console.print(
        f"{sum(figures['requests'].values())} requests, {figures['moves'].get('moved', 0)} moves, "
        f"{figures['tokens_checked']} tokens checked in {figures['seconds']:.0f} s"
    )
    for line in wrong or ["everything held"]:
        console.print(line, style="bold red" if wrong else "green", markup=False)
