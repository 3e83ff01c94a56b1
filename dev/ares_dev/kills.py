"""`python -m ares_dev kills`: workers are killed in the middle of their streams, one after the other.

A steady load of greedy streams runs; a decode worker gets SIGKILL, and what each of its streams waits for its next
token is measured at the client; then the worker is restarted and the next one dies. Finally a prefill worker is
killed, several times, while prompts wait at it. Every token is compared with those of a baseline run without kills.
"""

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ares.bench import sse, steady
from ares.bench.environment import write
from ares.bench.live import client
from ares.bench.live.load import Planned
from ares.bench.options import DecodeInstances, Dtype, JsonFile, Model, Port, Simulate
from ares.bench.streams import greedy_body, kv_blocks_used, random_streams
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.progress import progress_display
from ares.terminal.signals import signal_as_interrupt

# One or two tokens are in flight when an instance dies: a stream with this many since then has resumed.
_RESUMED = 8
_DETECTION_POLL_S = 0.01
# Prompts that wait at a prefill worker when it dies.
_BURST = 4
_BURST_PROMPT = 1500


def resumed_after(times_s: Sequence[float], killed_at: float) -> float | None:
    """Return the seconds from a kill to the first resumed token of a stream; None where none came.

    Tokens in flight arrive at once, and then none until the stream resumes: the longest wait after the kill ends with
    the first resumed token. A longer wait later would only make the figure larger.
    """
    points = [killed_at, *(time for time in times_s if time > killed_at)]
    if len(points) == 1:
        return None
    _, end = max(itertools.pairwise(points), key=lambda pair: pair[1] - pair[0])
    return end - killed_at


def _kill(process: local.ManagedProcess) -> float:
    """Kill a worker with all its processes; return when."""
    os.killpg(process.popen.pid, signal.SIGKILL)
    return time.monotonic()


async def _kill_decode(
    load: steady.Load, cluster: local.Cluster, process: local.ManagedProcess, least: int
) -> dict[str, Any]:
    """Kill a decode worker, and wait until its streams have resumed and it is back."""
    (name,) = process.instances
    affected = await load.streams_under_way(name, least)
    machine = steady.machine_load()
    killed_at = _kill(process)
    detecting = asyncio.create_task(
        steady.wait_for(load.http, load.url, name, lambda seen: not seen.get("healthy"), _DETECTION_POLL_S)
    )
    async with asyncio.timeout(300):
        while any(  # noqa: ASYNC110 - nothing announces it
            seen.name in load.running and sum(time > killed_at for time in seen.times_s) < _RESUMED for seen in affected
        ):
            await asyncio.sleep(0.02)
    detected_at = await detecting
    waits = [resumed_after(seen.times_s, killed_at) for seen in affected]
    await asyncio.to_thread(process.popen.wait)
    rejoin_s = await steady.restart_worker(load.http, load.url, cluster, process)
    return {
        "instance": name,
        "streams": len(affected),
        "resumed_s": [round(wait, 4) for wait in waits if wait is not None],
        "detected_s": round(detected_at - killed_at, 4),
        "rejoined_s": round(rejoin_s, 2),
        "load_average": machine,
    }


async def _kill_prefill(
    load: steady.Load, cluster: local.Cluster, process: local.ManagedProcess, burst: list[Planned]
) -> dict[str, Any]:
    """Kill a prefill worker while prompts wait at it."""
    (name,) = process.instances
    sent = [asyncio.create_task(load.send(each)) for each in burst]
    async with asyncio.timeout(60):
        while not (all(task.done() for task in sent) or await _prefilling(load)):  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.005)
    machine = steady.machine_load()
    killed_at = _kill(process)
    seen = await asyncio.gather(*sent)
    await asyncio.to_thread(process.popen.wait)
    rejoin_s = await steady.restart_worker(load.http, load.url, cluster, process)
    return {
        "instance": name,
        "first_token_s": [round(one.first_s - killed_at, 4) for one in seen if one.first_s > killed_at],
        "rejoined_s": round(rejoin_s, 2),
        "load_average": machine,
        "tokens": {each.name: one.tokens for each, one in zip(burst, seen, strict=True)},
    }


async def _prefilling(load: steady.Load) -> bool:
    read = await client.gateway_status(load.http, load.url)
    return any(row["state"] == "prefill" and row["id"].startswith("burst") for row in read["requests"])


def _bursts(count: int, tokens: int) -> list[list[Planned]]:
    """Return long prompts that no prefix cache has seen: their prefill takes a while."""
    generator = random.Random(11)  # noqa: S311 - a workload, not a secret

    return [
        [Planned(f"burst-{kill}-{n}", 0.0, greedy_body(generator, _BURST_PROMPT, tokens)) for n in range(_BURST)]
        for kill in range(count)
    ]


async def measure(
    cluster: local.Cluster, kills: int, prefill_kills: int, streams: int, tokens: int, console: Console
) -> dict[str, Any]:
    """Kill decode workers `kills` times, then the prefill worker `prefill_kills` times, and return the figures."""
    url, model = cluster.url, cluster.settings.model
    decode = [process for process in cluster.workers if process.name.startswith("decode")]
    (prefill,) = [process for process in cluster.workers if process.name.startswith("prefill")]
    planned = random_streams(streams, tokens)
    bursts = _bursts(prefill_kills, max(2, tokens // 4))
    rows: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    broken: list[str] = []
    async with sse.session() as http:
        load = steady.Load(http, url, model, planned, await steady.baseline_outputs(http, url, model, planned))
        load.start(streams)
        try:
            with _progress(console) as progress:
                task = progress.add_task("decode workers killed", total=kills)
                for number in range(kills):
                    rows.append(await _kill_decode(load, cluster, decode[number % len(decode)], max(1, streams // 4)))
                    progress.advance(task)
                task = progress.add_task("prefill workers killed", total=prefill_kills)
                for burst in bursts:
                    waiting.append(await _kill_prefill(load, cluster, prefill, burst))
                    progress.advance(task)
        except (local.ClusterError, TimeoutError) as error:
            broken.append(str(error) or repr(error))  # the figures until then are still reported
        await load.stop()
        # Only now: a prompt that was prefilled before would be in the prefix cache.
        flat = [each for burst in bursts[: len(waiting)] for each in burst]
        baseline = await steady.baseline_outputs(http, url, model, flat) if flat else {}
        load.wrong += [name for row in waiting for name, seen in row.pop("tokens").items() if seen != baseline[name]]
        read = await client.gateway_status(http, url)
    return {
        "broken_off": broken,
        **load.summary(),
        "blocks_left": sum(kv_blocks_used(read).values()),
        "decode": _summary(rows, "resumed_s"),
        "prefill": _summary(waiting, "first_token_s"),
        "decode_kills": rows,
        "prefill_kills": waiting,
    }


def _progress(console: Console) -> Progress:
    return progress_display(console, TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())


def _summary(rows: list[dict[str, Any]], what: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "kills": len(rows),
        what.removesuffix("_s"): steady.latency_summary([t for r in rows for t in r[what]]),
    }
    if what == "resumed_s":
        made["detected"] = steady.latency_summary([row["detected_s"] for row in rows])
        made["streams_that_did_not_resume"] = sum(row["streams"] - len(row[what]) for row in rows)
    made["rejoined"] = steady.latency_summary([row["rejoined_s"] for row in rows])
    return made


def command(
    kills: Annotated[int, typer.Option(min=1, help="Decode workers to kill.")] = 20,
    prefill_kills: Annotated[int, typer.Option(min=0, help="Prefill workers to kill after that.")] = 4,
    streams: Annotated[int, typer.Option(min=2, help="Concurrent streams.")] = 8,
    tokens: Annotated[int, typer.Option(min=80, help="Output tokens of a stream.")] = 400,
    decode: DecodeInstances = 2,
    dtype: Dtype = "float32",
    simulate: Simulate = None,
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
) -> None:
    """Kill workers under load: time to the first resumed token, requests lost, tokens wrong; status 1 where any was."""
    signal_as_interrupt()
    settings = steady.cluster_settings(model, decode, port, simulate, dtype)
    console = Console(stderr=True)
    before = steady.machine_load()
    with local.running(settings, console) as cluster:
        figures = asyncio.run(measure(cluster, kills, prefill_kills, streams, tokens, console))
    result = {
        **steady.result_header("kills", model, simulate, dtype, decode),
        "streams_at_a_time": streams,
        "tokens_of_a_stream": tokens,
        "load_average": {"before": before, "after": steady.machine_load()},
        **figures,
    }
    _show(figures)
    write(result, json_file)
    if steady.lost(figures) or figures["decode"]["streams_that_did_not_resume"]:
        raise typer.Exit(1)


def _show(figures: dict[str, Any]) -> None:
    table = tables.table("what", "count", "P50", "P90", "max", title="after a kill, ms")
    lines: list[tuple[str, Callable[[dict[str, Any]], dict[str, float]]]] = [
        ("first resumed token", lambda f: f["decode"]["resumed"]),
        ("noticed by the gateway", lambda f: f["decode"]["detected"]),
        ("decode worker back, from its restart", lambda f: f["decode"]["rejoined"]),
        ("first token of the prompts in prefill", lambda f: f["prefill"]["first_token"]),
    ]
    for name, read in lines:
        seen = read(figures)
        if seen["count"]:
            table.add_row(name, *(f"{seen[key]:.0f}" for key in ("count", "p50_ms", "p90_ms", "max_ms")))
    tables.show(table)
    steady.show_losses(figures)
