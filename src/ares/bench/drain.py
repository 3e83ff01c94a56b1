"""`ares bench drain`: how long an instance takes to empty by moving its requests, and by waiting for them.

The same requests run on one decode instance, with the same number of output tokens. In one run the instance is drained
and they move; in the other they finish on it, as in a drain without moves. Then the decode workers are stopped with
SIGTERM and restarted, one after the other and under load: no request may fail.
"""

import asyncio
import signal
import statistics
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

from ares.bench import sse, steady
from ares.bench.environment import write
from ares.bench.live import client
from ares.bench.live.client import Observed
from ares.bench.options import DecodeInstances, Dtype, JsonFile, Model, Port, Simulate
from ares.bench.streams import kv_blocks_used, random_streams
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.progress import progress_display
from ares.terminal.signals import signal_as_interrupt

MOVED, WAITED = "moved", "waited for"
# Output tokens that every request has when the clock starts.
_BEGUN = 20
_DEADLINE_S = 300.0


async def _post(load: steady.Load, path: str, body: dict[str, Any] | None = None) -> None:
    async with load.http.post(f"{load.url}/admin/v1/instances/{path}", json=body or {}) as reply:
        reply.raise_for_status()


async def _drained(load: steady.Load, name: str) -> None:
    await _post(load, f"{name}/drain", {"deadline_s": _DEADLINE_S})


async def _open(load: steady.Load, name: str) -> None:
    await _post(load, f"{name}/undrain")
    await steady.wait_for(load.http, load.url, name, lambda seen: bool(seen.get("healthy")) and not seen["draining"])


async def _on(load: steady.Load, name: str) -> int:
    read = await client.gateway_status(load.http, load.url)
    return sum(row["instance"] == name for row in read["requests"])


async def _turn(load: steady.Load, way: str, source: str, others: list[str]) -> dict[str, Any]:
    """Run all requests on `source`, and measure how long the instance takes to become empty."""
    for other in others:  # so that dispatch sends all of them to the source
        await _drained(load, other)
    sent = [asyncio.create_task(load.send(each)) for each in load.planned]
    while len(load.running) < len(sent) or any(len(seen.tokens) < _BEGUN for seen in load.running.values()):
        if any(task.done() for task in sent):
            raise steady.NotComparableError("an output ended before all requests had started: give more --tokens")
        await asyncio.sleep(0.02)
    for other in others:
        await _open(load, other)
    there, machine = await _on(load, source), steady.machine_load()
    left = [len(load.expected[each.name]) - len(_seen(load, each.name).tokens) for each in load.planned]
    began = time.monotonic()
    if way == MOVED:
        await _drained(load, source)
        ended = await steady.wait_for(load.http, load.url, source, lambda seen: seen.get("left") == 0)
    else:
        ended = await steady.wait_for(load.http, load.url, source, lambda seen: seen.get("running") == 0)
    await asyncio.gather(*sent)
    if way == MOVED:
        await _open(load, source)
    await client.wait_until_idle(load.http, load.url)
    return {
        "way": way,
        "requests_there": there,
        "tokens_left": {"median": statistics.median(left), "max": max(left)},
        "seconds": round(ended - began, 3),
        "load_average": machine,
    }


def _seen(load: steady.Load, name: str) -> Observed:
    return next(seen for seen in load.running.values() if seen.name.rpartition(".")[0] == name)


async def _restart(load: steady.Load, cluster: local.Cluster, process: local.ManagedProcess) -> dict[str, Any]:
    """Stop a worker while requests run on it, and start it again."""
    (name,) = process.instances
    await load.streams_under_way(name, 1)
    there, began = await _on(load, name), time.monotonic()
    process.popen.send_signal(signal.SIGTERM)
    await asyncio.to_thread(process.popen.wait, _DEADLINE_S)
    ended = time.monotonic()
    rejoin_s = await steady.restart_worker(load.http, load.url, cluster, process)
    return {
        "instance": name,
        "requests_there": there,
        "ended_s": round(ended - began, 2),
        "rejoined_s": round(rejoin_s, 2),
    }


async def measure(
    cluster: local.Cluster, running: int, tokens: int, repeats: int, streams: int, console: Console
) -> dict[str, Any]:
    """Drain one decode instance in both ways, then restart all of them under load, and return the figures."""
    url, model = cluster.url, cluster.settings.model
    processes = [process for process in cluster.workers if process.name.startswith("decode")]
    names = [name for process in processes for name in process.instances]
    planned = random_streams(running, tokens)
    async with sse.session() as http:
        expected = await steady.baseline_outputs(http, url, model, planned)
        load = steady.Load(http, url, model, planned, expected)
        turns: list[dict[str, Any]] = []
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with progress_display(console, *columns) as progress:
            task = progress.add_task("drains", total=2 * repeats)
            for number in range(repeats):
                # A B, B A, ...: a drift over time affects both alike.
                for way in (MOVED, WAITED) if number % 2 == 0 else (WAITED, MOVED):
                    turns.append(await _turn(load, way, names[0], names[1:]))
                    progress.advance(task)
            task = progress.add_task("workers restarted in turn", total=len(processes))
            rolling = steady.Load(http, url, model, planned, expected)
            rolling.start(streams)
            restarts = []
            for process in processes:
                restarts.append(await _restart(rolling, cluster, process))
                progress.advance(task)
            await rolling.stop()
        await client.wait_until_idle(http, url)
        read = await client.gateway_status(http, url)
    return {
        "seconds": {way: [turn["seconds"] for turn in turns if turn["way"] == way] for way in (MOVED, WAITED)},
        "turns": turns,
        "drains": load.summary(),
        "rolling_restart": {**rolling.summary(), "workers": restarts},
        "moves": dict(_outcomes(read)),
        "blocks_left": sum(kv_blocks_used(read).values()),
    }


def _outcomes(read: dict[str, Any]) -> dict[str, int]:
    found = [move["outcome"] for move in read["migrations"]]
    return {outcome: found.count(outcome) for outcome in sorted(set(found))}


def command(
    running: Annotated[int, typer.Option(min=1, help="Requests on the instance that is drained.")] = 16,
    tokens: Annotated[int, typer.Option(min=80, help="Output tokens of each request.")] = 400,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    streams: Annotated[int, typer.Option(min=2, help="Concurrent streams in the rolling restart.")] = 8,
    decode: DecodeInstances = 2,
    dtype: Dtype = "float32",
    simulate: Simulate = None,
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
) -> None:
    """Drain an instance with and without moves, then restart all workers under load; status 1 if a request failed."""
    signal_as_interrupt()
    deadline = ("--drain-deadline", str(_DEADLINE_S / 2))
    settings = steady.cluster_settings(model, decode, port, simulate, dtype, worker_flags=deadline)
    console = Console(stderr=True)
    with local.running(settings, console) as cluster:
        figures = asyncio.run(measure(cluster, running, tokens, repeats, streams, console))
    result = {
        **steady.result_header("drain", model, simulate, dtype, decode),
        "running": running,
        "tokens_of_a_request": tokens,
        **figures,
    }
    _show(figures)
    write(result, json_file)
    ended = (figures["drains"], figures["rolling_restart"])
    if figures["blocks_left"] or any(one["requests_lost"] or one["streams_with_other_tokens"] for one in ended):
        raise typer.Exit(1)


def _show(figures: dict[str, Any]) -> None:
    table = tables.table("its requests are", "median", "each", title="seconds until the instance is empty")
    for way, seconds in figures["seconds"].items():
        table.add_row(way, f"{statistics.median(seconds):.2f}", ", ".join(f"{each:.2f}" for each in seconds))
    rolling = figures["rolling_restart"]
    tables.show(
        table,
        f"rolling restart of {len(rolling['workers'])} workers: {rolling['streams']} streams, "
        f"{rolling['requests_lost']} lost, {rolling['streams_with_other_tokens']} with other tokens",
    )
