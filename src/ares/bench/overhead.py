"""`ares bench overhead`: what our connector costs while nothing moves.

Three real engines with the same model on the same core, measured in turns: without a connector, with stock
NixlConnector (with the CPU fixes of `ares.engine.connector.worker`, without which timings on a CPU mean nothing), and
with ours, which sends telemetry as it does to a gateway. Times and CPU seconds are compared: the latter tell more on a
machine where other programs run.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import time
from typing import Annotated, Any

import aiohttp
import typer
import zmq
import zmq.asyncio
from rich.console import Console

from ares import extras
from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Model
from ares.bench.percentiles import median_interval
from ares.bench.streams import greedy_body
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.protocol import fields, messages, rpc
from ares.terminal import tables
from ares.terminal.http_client import open_direct
from ares.terminal.progress import progress_display

_CONNECTORS = ("none", "stock", "ares")


async def gaps(http: aiohttp.ClientSession, url: str, model: str, batch: int, tokens: int) -> list[float]:
    """Return the times between tokens of `batch` streams that decode together, in seconds."""
    generator = random.Random(batch)  # noqa: S311 - a workload, not a secret

    async def one() -> list[float]:
        body = {
            "model": model,
            **greedy_body(generator, 64, tokens),
            "stream": True,
            "return_token_ids": True,
            "kv_transfer_params": {fields.KEY: f"overhead-{time.monotonic_ns()}"},
        }
        async with sse.open_stream(http, f"{url}/v1/completions", body) as chunks:
            times = [time.monotonic() async for _ in chunks]
        # The first gaps still contain the other streams' prefills.
        return [b - a for a, b in itertools.pairwise(times[batch:])]

    return list(itertools.chain.from_iterable(await asyncio.gather(*(one() for _ in range(batch)))))


async def tpot(http: aiohttp.ClientSession, url: str, model: str, batch: int, tokens: int) -> float:
    """Return the median time between tokens over `batch` streams that decode together, in seconds."""
    return statistics.median(await gaps(http, url, model, batch, tokens))


async def watch(url: str) -> None:
    """Subscribe to an instance's telemetry, as a gateway does."""
    with open_direct(f"{url}{fields.INSTANCE_ROUTE}", timeout=5) as reply:
        address = json.load(reply)["control_address"]
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.connect(address)
    try:
        while True:
            await socket.send(rpc.encode(messages.Subscribe(0.1)))
            for _ in range(20):
                await socket.recv()
    finally:
        socket.close(0)


def cpu_seconds(group: int) -> float:
    """Return the CPU seconds that the processes of a group have taken so far: an instance and its engine core."""
    import psutil

    taken = 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group:
                taken += sum(process.cpu_times()[:2])
    return taken


async def _measure(
    workers: list[local.ManagedProcess], model: str, batches: list[int], rounds: int, tokens: int
) -> list[dict[str, Any]]:
    urls = {process.name: process.url for process in workers}
    groups = {process.name: process.popen.pid for process in workers}
    results = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:
        watcher = asyncio.create_task(watch(urls["ares"]))
        try:
            with progress_display(Console(stderr=True)) as progress:
                task = progress.add_task("rounds", total=len(batches) * rounds * len(urls))
                for batch in batches:
                    runs: dict[str, list[float]] = {name: [] for name in urls}
                    cpu: dict[str, list[float]] = {name: [] for name in urls}
                    for number in range(rounds + 1):
                        for name, url in urls.items():
                            before = cpu_seconds(groups[name])
                            value = await tpot(http, url, model, batch, tokens)
                            if number:  # the first round warms up
                                runs[name].append(value)
                                cpu[name].append((cpu_seconds(groups[name]) - before) / tokens)
                                progress.advance(task)
                    of_cpu = {f"cpu_{name}": ratios for name, ratios in _ratios(cpu).items()}
                    results.append(
                        {"batch": batch, "rounds": rounds, "tpot_ms": _medians(runs), "cpu_ms_per_step": _medians(cpu)}
                        | _ratios(runs)
                        | of_cpu
                    )
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
    return results


def _medians(runs: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(1000 * statistics.median(values), 3) for name, values in runs.items()}


def _ratios(runs: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Compare our runs with those of the others, round by round."""
    return {
        f"ares_to_{name}": interval([a / b for a, b in zip(runs["ares"], runs[name], strict=True)])
        for name in ("stock", "none")
    }


def interval(values: list[float]) -> dict[str, float]:
    """Return the median with a 95 % bootstrap interval, rounded."""
    return {name: round(value, 4) for name, value in median_interval(values).items()}


def command(
    model: Model = DEFAULT_MODEL,
    batch: Annotated[list[int] | None, typer.Option(help="Concurrent streams; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measured rounds for each batch.")] = 10,
    tokens: Annotated[int, typer.Option(min=20, help="Output tokens of a stream.")] = 100,
    json_file: JsonFile = None,
) -> None:
    """Compare TPOT without a connector, with stock NixlConnector and with ours, while nothing moves."""
    extras.require("psutil")
    console = Console(stderr=True)
    cores = sorted(os.sched_getaffinity(0))
    settings = local.ClusterSettings(model=model, vllm_flags=tuple(local_flags([])))
    with local.workers_only(settings, console) as cluster:
        for name in _CONNECTORS:
            cluster.start_worker(name, "both", str(cores[-1]), ("--connector", name, "--predictor", "none"))
        cluster.await_workers()
        rows = asyncio.run(_measure(cluster.workers, model, batch or [1, 8], rounds, tokens))
    columns = ("none ms", "stock ms", "ares ms", "ares / stock", "ares / none", "of CPU: / stock", "/ none")
    table = tables.table("batch", *columns, title="TPOT while nothing moves")
    for row in rows:
        ratios = [row[f"{of}ares_to_{name}"] for of in ("", "cpu_") for name in ("stock", "none")]
        table.add_row(
            str(row["batch"]),
            *(f"{row['tpot_ms'][name]:.2f}" for name in _CONNECTORS),
            *(f"{r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f})" for r in ratios),
        )
    tables.show(table)
    write({"benchmark": "overhead", "model": model, **describe(), "cases": rows}, json_file)
