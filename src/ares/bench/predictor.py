"""`ares bench predictor`: what the predictor costs a running engine.

One real engine, which sends telemetry as it does to a gateway; with ``--learn`` it records states for a learner, too.
Between two runs of the same streams all of that is switched on or off through vLLM's development endpoint, so that
process, memory and caches are the same in both. TPOT is the mean over all tokens: only every 20th step makes
predictions, which a median would not show.
"""

import asyncio
import os
import statistics
import tempfile
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console

from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Model
from ares.bench.overhead import gaps, interval, watch
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.progress import progress_display

_STATES = ("off", "on")


async def _measure(url: str, model: str, batches: list[int], rounds: int, tokens: int) -> list[dict[str, Any]]:
    results = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
        watcher = asyncio.create_task(watch(url))
        try:
            with progress_display(Console(stderr=True)) as progress:
                task = progress.add_task("rounds", total=len(batches) * rounds)
                for batch in batches:
                    runs: dict[str, list[float]] = {state: [] for state in _STATES}
                    for number in range(rounds + 1):
                        # In alternating order, so that a machine that slows down affects both alike.
                        for state in _STATES if number % 2 else _STATES[::-1]:
                            await _switch(http, url, state)
                            value = statistics.fmean(await gaps(http, url, model, batch, tokens))
                            if number:  # the first round warms up
                                runs[state].append(value)
                        progress.advance(task, bool(number))
                    results.append(
                        {
                            "batch": batch,
                            "rounds": rounds,
                            "tpot_ms": {n: round(1000 * statistics.median(v), 3) for n, v in runs.items()},
                            "on_to_off": interval([a / b for a, b in zip(runs["on"], runs["off"], strict=True)]),
                        }
                    )
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
    return results


async def _switch(http: aiohttp.ClientSession, url: str, state: str) -> None:
    async with http.post(f"{url}/collective_rpc", json={"method": "ares_predict", "args": [state]}) as reply:
        reply.raise_for_status()


def command(
    model: Model = DEFAULT_MODEL,
    predictor: Annotated[
        str | None, typer.Option(help="Checkpoint; by default the one that ships for the model.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Concurrent streams; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measured rounds for each batch.")] = 30,
    tokens: Annotated[int, typer.Option(min=20, help="Output tokens of a stream.")] = 100,
    learn: Annotated[
        bool, typer.Option("--learn", help="With the predictor, record states for a learner, as `ares worker --learn`.")
    ] = False,
    core: Annotated[int | None, typer.Option(help="CPU core of the engine; by default the last one.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare TPOT with the predictor and without."""
    console = Console(stderr=True)
    cores = sorted(os.sched_getaffinity(0))
    place = str(core if core is not None else cores[-1])
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    flags = ("--predictor", predictor) if predictor else ()
    settings = local.ClusterSettings(model=model, vllm_flags=tuple(local_flags([])))
    with tempfile.TemporaryDirectory() as recorded, local.workers_only(settings, console) as cluster:
        cluster.start_worker(
            "engine", "both", place, (*flags, "--learn", "--learn-folder", recorded) if learn else flags
        )
        cluster.await_workers()
        rows = asyncio.run(_measure(cluster.workers[0].url, model, batch or [1, 8, 32], rounds, tokens))
    table = tables.table("batch", "off ms", "on ms", "on / off", title="TPOT with the predictor and without")
    for row in rows:
        ratio, times = row["on_to_off"], row["tpot_ms"]
        shown = f"{ratio['median']:.4f} ({ratio['low']:.4f}-{ratio['high']:.4f})"
        table.add_row(str(row["batch"]), f"{times['off']:.2f}", f"{times['on']:.2f}", shown)
    tables.show(table)
    write({"benchmark": "predictor", "model": model, "learn": learn, **describe(), "cases": rows}, json_file)
