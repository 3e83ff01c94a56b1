"""`ares bench live --workload multi-turn`: what placement by prefix saves, against placement that is blind to it."""

import asyncio
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.live import load
from ares.bench.live.client import Observed, gateway_status, wait_until_idle
from ares.bench.live.conversations import Conversation, converse, reusable_tokens
from ares.bench.percentiles import median_interval, percentiles
from ares.local_cluster import cluster as local
from ares.terminal import tables
from ares.terminal.progress import progress_display

if TYPE_CHECKING:
    from ares.bench.live.simulated_prefixes import Simulated

NAME = "multi-turn"
# Tokens of the longest conversation on mock engines.
LONGEST = 8192
PRESETS = "static-rr,static-least-loaded,static-prefix,ares,ares-prefix"
# Before the start, so that the first conversations are not late.
_LEAD_S = 0.5
# Of a run, that are listed.
_ERRORS = 5
_COMPUTED = re.compile(
    r'^vllm:prompt_tokens_by_source(?:_total)?\{[^}]*source="local_compute"[^}]*\} (\S+)$', re.MULTILINE
)


async def _computed(http: aiohttp.ClientSession, status: dict[str, Any]) -> float:
    """Return the prompt tokens that all instances have computed since their start."""
    total = 0.0
    for row in status["instances"]:
        async with http.get(f"{row['url']}/metrics") as reply:
            total += sum(float(value) for value in _COMPUTED.findall(await reply.text()))
    return total


async def _run(
    url: str,
    model: str,
    preset: str,
    conversations: list[Conversation],
    salt: str,
    simulated: "Simulated | None",
    done: Callable[[], None],
) -> dict[str, Any]:
    """Run all conversations under a preset; return the figures."""
    async with sse.session() as http:
        await wait_until_idle(http, url)
        async with http.put(f"{url}/admin/v1/preset", json={"preset": preset}) as reply:
            reply.raise_for_status()
        before = await _computed(http, await gateway_status(http, url))
        start = time.monotonic() + _LEAD_S
        seen = await asyncio.gather(*(converse(http, url, model, one, start, salt, done) for one in conversations))
        await wait_until_idle(http, url)
        computed = await _computed(http, await gateway_status(http, url)) - before
    found = figures(preset, conversations, list(seen), computed)
    if simulated is not None:
        found["simulated_hit_rate"] = simulated.hit_rate(preset, conversations, seen)
    return found


def figures(
    preset: str, conversations: list[Conversation], seen: list[list[Observed]], computed: float
) -> dict[str, Any]:
    """Return the figures of a run in which instances have computed so many tokens of prompts."""
    came = [one for turns in seen for one in turns if one.error is None]
    later = [one for turns in seen for one in turns[1:] if one.error is None]
    prompts = sum(one.prompt_tokens for one in came)
    reusable = reusable_tokens(conversations)
    return {
        "preset": preset,
        "turns": sum(len(one.turns) for one in conversations),
        "failed": sum(one.error is not None for turns in seen for one in turns),
        "errors": sorted({one.error for turns in seen for one in turns if one.error is not None})[:_ERRORS],
        "ttft_first_turns_s": percentiles([turns[0].ttft_s for turns in seen if turns[0].error is None], 50, 99),
        "ttft_later_turns_s": percentiles([one.ttft_s for one in later], 50, 99),
        "tpot_s": percentiles([one.tpot_s for one in came if len(one.tokens) > 1], 50, 99),
        "prompt_tokens": prompts,
        "prompt_tokens_computed": computed,
        "share_computed": computed / max(prompts, 1),
        "hit_rate": 1.0 - computed / max(prompts, 1),
        # Blocks are whole, and the last token of a prompt is always computed: slightly below 1 at best.
        "share_of_reusable_found": (prompts - computed) / max(reusable, 1),
    }


async def _measure(
    url: str,
    model: str,
    presets: list[str],
    rounds: list[list[Conversation]],
    simulated: "Simulated | None",
    console: Console,
) -> list[list[dict[str, Any]]]:
    every = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with progress_display(console, *columns) as progress:
        for number, chats in enumerate(rounds):
            runs = []
            for name in load.order(presets, number):
                turns = sum(len(one.turns) for one in chats)
                task = progress.add_task(f"round {number + 1}, {name}", total=turns)
                salt = f"{number}-{name}"
                runs.append(await _run(url, model, name, chats, salt, simulated, partial(progress.advance, task)))
            every.append(sorted(runs, key=lambda run: presets.index(run["preset"])))
    return every


def measure(
    url: str,
    model: str,
    presets: list[str],
    rounds: list[list[Conversation]],
    simulated: "Simulated | None",
    console: Console,
) -> dict[str, Any]:
    """Run every preset over the same conversations, in turns; return the figures, and ratios paired by round."""
    every = asyncio.run(_measure(url, model, presets, rounds, simulated, console))
    bases = [name for name in presets if name.startswith("static") or name == "off"] or presets[:1]
    ratios = [_ratio(every, presets, name, base) for name in presets for base in bases if name != base]
    return {"rounds": [{"runs": runs} for runs in every], "ratios": ratios}


_MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "ttft_later_turns_p50": lambda run: float(run["ttft_later_turns_s"]["p50"]),
    "ttft_later_turns_p99": lambda run: float(run["ttft_later_turns_s"]["p99"]),
    "tpot_p50": lambda run: float(run["tpot_s"]["p50"]),
    "share_computed": lambda run: float(run["share_computed"]),
}


def _ratio(every: list[list[dict[str, Any]]], presets: list[str], name: str, base: str) -> dict[str, Any]:
    result: dict[str, Any] = {"preset": name, "baseline": base}
    for measure_name, read in _MEASURES.items():
        each = [read(runs[presets.index(name)]) / read(runs[presets.index(base)]) for runs in every]
        result[measure_name] = median_interval(each) | {"rounds": each}
    return result


def run(
    settings: local.ClusterSettings,
    presets: list[str],
    rounds: list[list[Conversation]],
    described: dict[str, Any],
    json_file: Path | None,
) -> None:
    """Start a cluster, measure, and print and write the result; `described` are further fields of it."""
    console = Console(stderr=True)
    simulated = None
    if settings.simulate is not None and settings.prefill:
        from ares.bench.live.simulated_prefixes import Simulated  # importing the simulator takes a while

        simulated = Simulated.of(settings.simulate, described["kv_tokens"], settings.prefill)
    with local.running(settings, console) as cluster:
        measured = measure(cluster.url, settings.model, presets, rounds, simulated, console)
    result = {
        "benchmark": f"live {NAME}",
        **described,
        "prefill": settings.prefill,
        "decode": settings.decode,
        "engine_flags": list(settings.vllm_flags),
        "conversations": len(rounds[0]),
        **describe(),
        **measured,
    }
    show(result, presets)
    write(result, json_file)


def show(result: dict[str, Any], presets: list[str]) -> None:
    """Print the figures: medians over the rounds."""
    rounds = result["rounds"]
    simulated = "simulated_hit_rate" in rounds[0]["runs"][0]
    columns = (
        "later turns\nTTFT p50 s",
        "p99 s",
        "first turns\np50 s",
        "TPOT\np50 ms",
        "computed\n%",
        "of reusable\n%",
        "simulated hits,\nmeasured %",
    )
    table = tables.table("preset", *columns, title=f"medians over {len(rounds)} rounds")

    def median(name: str, *path: str) -> float:
        values = []
        for one in rounds:
            value: Any = one["runs"][presets.index(name)]
            for key in path:
                value = value[key]
            values.append(float(value))
        return statistics.median(values)

    for name in presets:
        table.add_row(
            name,
            f"{median(name, 'ttft_later_turns_s', 'p50'):.3f}",
            f"{median(name, 'ttft_later_turns_s', 'p99'):.3f}",
            f"{median(name, 'ttft_first_turns_s', 'p50'):.3f}",
            f"{1e3 * median(name, 'tpot_s', 'p50'):.1f}",
            f"{100 * median(name, 'share_computed'):.1f}",
            f"{100 * median(name, 'share_of_reusable_found'):.1f}",
            f"{100 * median(name, 'simulated_hit_rate'):.1f}, {100 * median(name, 'hit_rate'):.1f}"
            if simulated
            else "",
        )
    tables.show(table)
    failed = sum(run["failed"] for one in rounds for run in one["runs"])
    tables.show(f"turns that failed: {failed} of {sum(run['turns'] for one in rounds for run in one['runs'])}")
