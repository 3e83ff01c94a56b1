"""`python -m ares_dev moves`: hundreds of moves in one run, without losing a token, a block or a lease.

Greedy streams run once without moves, then again while each is moved back and forth. Their tokens must be the same;
every instance must end with nothing running, nothing pinned and its first count of free blocks; no lease may have
expired.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console

from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.live import client
from ares.bench.nixl_counters import FAULTS, faults
from ares.bench.options import Dtype, JsonFile, Model, Port
from ares.bench.streams import kv_blocks_used, random_streams, send_all
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal.progress import progress_display

# A stream is moved again after this many tokens.
_BETWEEN = 10


async def keep_moving(
    http: aiohttp.ClientSession,
    url: str,
    outcomes: Counter[str],
    enough: asyncio.Event,
    *,
    modes: Sequence[str] = ("auto",),
    between: int = _BETWEEN,
    pause_s: float = 0.02,
) -> None:
    """Move every movable stream to another decode instance, each again after some tokens, in these modes in turns."""
    moved_at: dict[str, int] = {}
    turns = itertools.cycle(modes)

    async def move(request: str, target: str) -> None:
        order = {"request_id": request, "target": target, "mode": next(turns)}
        async with http.post(f"{url}/admin/v1/migrations", json=order) as reply:
            read = await reply.json()
        outcomes[read.get("outcome") or f"refused: {read['error'].get('code')}"] += 1

    while not enough.is_set():
        read = await client.gateway_status(http, url)
        names = [row["name"] for row in read["instances"] if row["role"] != "prefill"]
        moved_at = {row["id"]: moved_at.get(row["id"], 0) for row in read["requests"]}
        orders = []
        for row in read["requests"]:
            if row["movable"] and row["output_tokens"] >= moved_at[row["id"]] + between:
                moved_at[row["id"]] = row["output_tokens"]
                orders.append(move(row["id"], names[(names.index(row["instance"]) + 1) % len(names)]))
        await asyncio.gather(*orders)
        await asyncio.sleep(pause_s)


async def _measure(
    url: str, urls: list[str], model: str, streams: int, tokens: int, moves: int, console: Console
) -> dict[str, Any]:
    planned = random_streams(streams, tokens)
    outcomes: Counter[str] = Counter()
    wrong = rounds = received = 0
    async with sse.session() as http:
        await client.wait_until_idle(http, url)
        baseline = {seen.name: seen.tokens for seen in await send_all(http, url, model, planned)}
        await client.wait_until_idle(http, url)
        before, free = await faults(http, urls), kv_blocks_used(await client.gateway_status(http, url))
        with progress_display(console) as progress:
            task = progress.add_task("moves", total=moves)
            while outcomes["moved"] < moves:
                enough = asyncio.Event()
                mover = asyncio.create_task(keep_moving(http, url, outcomes, enough))
                again = await send_all(http, url, model, planned)
                enough.set()
                await mover
                rounds += 1
                received += sum(len(seen.tokens) for seen in again)
                wrong += sum(seen.error is not None or seen.tokens != baseline[seen.name] for seen in again)
                progress.update(task, completed=outcomes["moved"])
        await client.wait_until_idle(http, url)
        after = await faults(http, urls)
        left = kv_blocks_used(await client.gateway_status(http, url))
    return {
        "rounds": rounds,
        "streams": streams,
        "output_tokens": received,
        "moves": dict(outcomes),
        "streams_with_other_tokens": wrong,
        "blocks_left": sum(left.values()) - sum(free.values()),
        "faults": {name: after[name] - before[name] for name in FAULTS},
    }


def command(
    context: typer.Context,
    moves: Annotated[int, typer.Option(min=1, help="Moves to make.")] = 500,
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 8,
    tokens: Annotated[int, typer.Option(min=20, help="Output tokens of a stream.")] = 200,
    dtype: Dtype = "float32",
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
) -> None:
    """Move running streams hundreds of times on real engines, and look for anything lost; status 1 if anything is.

    Other flags are vLLM's, for every instance.
    """
    flags = [flag for flag in context.args if flag != "--"]
    settings = local.ClusterSettings(
        model=model, preset="off", port=port, vllm_flags=tuple(local_flags(["--dtype", dtype, *flags]))
    )
    console = Console(stderr=True)
    with local.running(settings, console) as cluster:
        urls = [url for worker in cluster.workers for url in worker.instances.values()]
        figures = asyncio.run(_measure(cluster.url, urls, model, streams, tokens, moves, console))
    Console().print_json(data=figures)
    write({"benchmark": "moves", "model": model, "dtype": dtype, "flags": flags, **describe(), **figures}, json_file)
    if figures["streams_with_other_tokens"] or figures["blocks_left"] or any(figures["faults"].values()):
        raise typer.Exit(1)
