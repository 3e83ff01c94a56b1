"""`ares bench stall`: how long a client waits for its next token when its request moves.

Real engines, moves by command. The stall is measured at the client: the longest wait between two tokens while the move
is under way, compared with the median wait between tokens of the same stream when nothing moves.
"""

import asyncio
import itertools
import random
import statistics
import time
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console

from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.live.client import gateway_status
from ares.bench.options import JsonFile, Model, Port
from ares.bench.percentiles import milliseconds, percentiles
from ares.bench.streams import Watched, greedy_body
from ares.engine.defaults import DEFAULT_PULL_BYTES, local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.progress import progress_display

# Tokens before a move: enough for the gaps of an undisturbed stream.
_BETWEEN = 12
# Of moves by command (docs/migration.md).
_MODES = ("stop_and_copy", "pre_copy", "auto")
_ATTEMPTS = 5


class NotMovedError(RuntimeError):
    """A stream was not moved."""


def _body(model: str, context: int, generator: random.Random, tokens: int) -> dict[str, Any]:
    # With token ids there is one chunk for every token, also for those that have no text yet.
    return {"model": model, **greedy_body(generator, context, tokens), "stream": True, "return_token_ids": True}


async def _fill(http: aiohttp.ClientSession, url: str, model: str, generator: random.Random, number: int) -> None:
    """Keep one stream running, until cancelled."""
    while True:
        await Watched().follow(http, url, _body(model, 200, generator, 3500), f"background-{number}")


async def _instance_of(http: aiohttp.ClientSession, url: str, name: str) -> str | None:
    rows = (await gateway_status(http, url))["requests"]
    return next((row["instance"] for row in rows if row["id"] == name), None)


async def _move(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any], name: str, mode: str
) -> tuple[float, list[float], dict[str, Any]]:
    """Move one new stream once; return its stall, its undisturbed gaps before, and the gateway's record.

    Raises
    ------
    NotMovedError
        It was refused or failed: on a busy machine an instance may be silent for a while.
    """
    names = [f"decode-{n}" for n in range(2)]
    watched = Watched()
    stream = asyncio.create_task(watched.follow(http, url, body, name))
    try:
        await watched.reach(_BETWEEN, stream)
        quiet = watched.times[2:_BETWEEN]
        source = await _instance_of(http, url, name)
        start = time.monotonic()
        order = {"request_id": name, "target": names[source == names[0]], "mode": mode}
        async with http.post(f"{url}/admin/v1/migrations", json=order) as reply:
            record = await reply.json()
        if record.get("outcome") != "moved":
            raise NotMovedError(f"the move failed: {record}")
        await watched.reach(len(watched.times) + 1, stream)
        waits = [after - before for before, after in itertools.pairwise(watched.times) if after > start]
        return max(waits), [after - before for before, after in itertools.pairwise(quiet)], record
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)


async def _case(
    http: aiohttp.ClientSession, url: str, model: str, load: str, context: int, moves: int, modes: list[str], tick: Any
) -> list[dict[str, Any]]:
    """Move streams of one length, alternating between the modes."""
    generator = random.Random(f"{load} {context}")  # noqa: S311 - a workload, not a secret
    stalls: dict[str, list[float]] = {mode: [] for mode in modes}
    gaps: dict[str, list[float]] = {mode: [] for mode in modes}
    records: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for number in range(moves):
        # A B B A: neither mode is always the first after a pause.
        for mode in modes if number % 2 == 0 else reversed(modes):
            for attempt in range(_ATTEMPTS):
                name = f"stall-{mode}-{context}-{number}-{time.monotonic_ns()}"
                # A new prompt for each move: no prefix cache has any part of it.
                body = _body(model, context, generator, 8 * _BETWEEN)
                try:
                    stall, quiet, record = await _move(http, url, body, name, mode)
                    break
                except NotMovedError:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    await asyncio.sleep(1.0)
            stalls[mode].append(stall)
            gaps[mode] += quiet
            records[mode].append(record)
            tick()
    return [_row(context, mode, stalls[mode], gaps[mode], records[mode]) for mode in modes]


def _row(
    context: int, mode: str, stalls: list[float], gaps: list[float], records: list[dict[str, Any]]
) -> dict[str, Any]:
    gap = statistics.median(gaps)
    return {
        "context_tokens": context,
        "mode": mode,
        "chosen": sorted({r["mode"] for r in records}),
        "moves": len(stalls),
        "gap_ms": _summary(gaps),
        "stall_ms": _summary(stalls),
        "undisturbed_in_gaps": percentiles([each / gap for each in gaps], 50, 95),
        "stall_in_gaps": percentiles([stall / gap for stall in stalls], 50, 95),
        "gateway_stall_ms": _summary([r["stall_s"] for r in records]),
        "cut_ms": _summary([r["cut_s"] for r in records]),
        "accept_ms": _summary([r["accept_s"] for r in records]),
        "queued_ms": _summary([r["queued_s"] or 0.0 for r in records]),
        "precopy_ms": _summary([r["precopy_s"] or 0.0 for r in records]),
        "precopied_tokens": statistics.median(r["precopied_tokens"] for r in records),
        "pulled_tokens": statistics.median(r["pulled_tokens"] or 0 for r in records),
    }


def _summary(seconds: list[float]) -> dict[str, float]:
    return milliseconds(seconds, 50, 95, digits=2)


async def _measure(
    url: str, model: str, contexts: list[int], moves: int, modes: list[str], background: int
) -> list[dict[str, Any]]:
    results = []
    async with sse.session(silence_s=120.0) as http:
        with progress_display(Console(stderr=True)) as progress:
            task = progress.add_task("moves", total=2 * len(contexts) * len(modes) * moves)
            for load, streams in (("idle", 0), ("busy", 2 * background)):
                generator = random.Random(7)  # noqa: S311 - likewise
                others = [asyncio.create_task(_fill(http, url, model, generator, number)) for number in range(streams)]
                await asyncio.sleep(3.0 if streams else 0.5)
                try:
                    for context in contexts:
                        progress.update(task, description=f"{load}, {context} tokens")
                        rows = await _case(
                            http, url, model, load, context, moves, modes, lambda: progress.advance(task)
                        )
                        shared = {"load": load, "background_streams_per_instance": streams // 2}
                        results += [{**shared, **row} for row in rows]
                finally:
                    for other in others:
                        other.cancel()
                    await asyncio.gather(*others, return_exceptions=True)
    return results


def command(
    model: Model = DEFAULT_MODEL,
    context: Annotated[list[int] | None, typer.Option(help="Context lengths; repeat for several.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="stop_and_copy, pre_copy or auto; repeat for several, by default both.")
    ] = None,
    moves: Annotated[int, typer.Option(min=1, help="Moves for each length, mode and load.")] = 24,
    background: Annotated[int, typer.Option(min=1, help="Other streams on each busy instance.")] = 4,
    pull_within_step_bytes: Annotated[int, typer.Option(help="As for `ares worker`; 0 pulls between steps.")] = (
        DEFAULT_PULL_BYTES
    ),
    max_model_len: Annotated[int | None, typer.Option(min=1, help="As for vLLM, for longer contexts.")] = None,
    port: Port = 8010,
    json_file: JsonFile = None,
) -> None:
    """Measure the client-visible stall of moves on real engines, by context length, on idle and busy instances."""
    modes = mode or ["stop_and_copy", "pre_copy"]
    if unknown := set(modes) - set(_MODES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: one of {', '.join(_MODES)}", param_hint="--mode")
    flags = [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    settings = local.ClusterSettings(
        model=model,
        preset="off",
        port=port,
        vllm_flags=tuple(local_flags(flags)),
        worker_flags=("--pull-within-step-bytes", str(pull_within_step_bytes)),
    )
    with local.running(settings) as cluster:
        rows = asyncio.run(
            _measure(cluster.url, model, context or [128, 512, 1024, 2048, 3500], moves, modes, background)
        )
    result = {
        "benchmark": "stall",
        "model": model,
        "pull_within_step_bytes": pull_within_step_bytes,
        **describe(),
        "cases": rows,
    }
    columns = ("context", "mode", "gap ms", "stall ms", "p95 ms", "gaps", "p95 gaps")
    table = tables.table("load", *columns, title="client-visible stall of a move")
    for row in rows:
        table.add_row(
            row["load"],
            str(row["context_tokens"]),
            row["mode"],
            f"{row['gap_ms']['p50']:.1f}",
            f"{row['stall_ms']['p50']:.1f}",
            f"{row['stall_ms']['p95']:.1f}",
            f"{row['stall_in_gaps']['p50']:.2f}",
            f"{row['stall_in_gaps']['p95']:.2f}",
        )
    tables.show(table)
    write(result, json_file)
