"""`python -m ares_dev roles`: the planner of roles on real engines, beside fixed ratios of prefill + decode instances.

Traffic turns from long prompts with short outputs to short prompts with long outputs and back, over three instances.
The same requests come at the same times under every ratio. The first fixed ratio is the run without changes: every
token of the others is compared with its.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
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
from ares.bench.live.load import Planned
from ares.bench.options import Dtype, JsonFile, Model, Port
from ares.bench.percentiles import percentiles
from ares.bench.streams import greedy_body, kv_blocks_used, send_all
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.signals import signal_as_interrupt
from ares_dev import fork_server

# The instances, and the role of each under a fixed ratio of prefill + decode.
_INSTANCES = ("prefill-0", "decode-0", "decode-1")
_FIXED = {"1+2": ("prefill", "decode", "decode"), "2+1": ("prefill", "prefill", "decode")}
PLANNED = "planned"
_BEGINS = "1+2"
_LEAD_S = 1.0
_ORDER_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of traffic: tokens of a prompt and of an output, and requests a second."""

    prompt: int
    output: int
    rate: float


def phases(kinds: tuple[Traffic, Traffic], count: int, seconds: float, seed: int) -> list[list[Planned]]:
    """Return the requests of each phase; the two kinds of traffic take turns."""
    generator = random.Random(seed)  # noqa: S311 - a workload, not a secret
    made: list[list[Planned]] = []
    for number, kind in zip(range(count), itertools.cycle(kinds), strict=False):
        at, requests = generator.expovariate(kind.rate), list[Planned]()
        while at < seconds:
            body = greedy_body(generator, kind.prompt, kind.output)
            requests.append(Planned(f"phase-{number}-{len(requests)}", number * seconds + at, body))
            at += generator.expovariate(kind.rate)
        made.append(requests)
    return made


# --- the gateway and the roles under one ratio ---


def start_gateway(cluster: local.Cluster, way: str, settings: dict[str, float], command: list[str]) -> None:
    """Start the gateway again, with the planner or without; `command` is that without."""
    process = next(one for one in cluster.processes if one.name == local.GATEWAY)
    process.send(signal.SIGTERM)
    process.popen.wait(_ORDER_S)
    planned = way == PLANNED
    process.command = [*command, *(["--role-planner", "act"] if planned else [])]
    own = {"ARES_ROLE_PLANNER_SETTINGS": json.dumps(settings)} if planned else {}
    process.environment = {**os.environ, **own}
    cluster.restart(process)
    cluster.await_gateway()


def unbind(cluster: local.Cluster) -> None:
    """Let every instance run on all cores, one thread each.

    Where there are more instances than cores, each is bound to one that others have too: a second prefill instance
    would get that of the first one, and compute nothing more.
    """
    import psutil

    groups = {process.popen.pid for process in cluster.workers}
    cores = os.sched_getaffinity(0)
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) in groups:
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, cores)
        except (psutil.Error, ProcessLookupError):  # it has ended meanwhile
            continue


async def order(http: aiohttp.ClientSession, url: str, name: str, role: str) -> None:
    """Give an instance a role, and wait until it has it."""
    if (await steady.instance_row(http, url, name)).get("role") != role:
        async with http.post(f"{url}/admin/v1/instances/{name}/role", json={"role": role}) as reply:
            if reply.status != 200:
                raise steady.NotComparableError(f"{name} does not become {role}: {await reply.text()}")
    await steady.wait_for(http, url, name, lambda row: row.get("role") == role and row.get("next_role") is None)


async def _roles(http: aiohttp.ClientSession, url: str, way: str) -> None:
    """Wait until all instances are open, and give them the roles that a run begins with."""
    for name in _INSTANCES:
        await steady.wait_for(http, url, name, lambda row: bool(row.get("healthy")) and row.get("why") is None)
    wanted = dict(zip(_INSTANCES, _FIXED[_BEGINS if way == PLANNED else way], strict=True))
    # Those that are to decode first: never is the last one of a role taken.
    for name in sorted(wanted, key=lambda name: wanted[name]):
        await order(http, url, name, wanted[name])


# --- one run ---


async def run(
    url: str, model: str, way: str, load: list[list[Planned]], round_: int, objectives_s: tuple[float, float]
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Send all requests under a ratio; return its figures, and the tokens of each request that ended."""
    async with sse.session() as http:
        await _roles(http, url, way)
        # Every engine computes something first: first requests take longer.
        warm = [Planned(f"warm-{n}", 0.0, greedy_body(random.Random(n), 32, 16)) for n in range(6)]  # noqa: S311
        await send_all(http, url, model, warm)
        await client.wait_until_idle(http, url)
        before = await client.gateway_status(http, url)
        machine = steady.machine_load()
        # Nothing is cached from an earlier run.
        salt = {"cache_salt": f"{way}-{round_}"}
        flat = [Planned(one.name, one.at_s, {**one.body, **salt}) for requests in load for one in requests]
        start, started_at = time.monotonic() + _LEAD_S, time.time() + _LEAD_S
        asked = (client.send_request(http, url, model, one, start) for one in flat)
        seen = {one.name: one for one in await asyncio.gather(*asked)}
        await client.wait_until_idle(http, url)
        status = await client.gateway_status(http, url)
        async with http.get(f"{url}/admin/v1/instances") as reply:
            changes = (await reply.json())["changes"]
    moves = [one for one in status["migrations"] if one["started_at"] > before["now"]]
    found = {
        "way": way,
        "round": round_,
        "phases": [figures([seen[one.name] for one in requests], objectives_s) for requests in load],
        "all": figures(list(seen.values()), objectives_s),
        "role_changes": changes_since(changes, started_at),
        "moves": dict(Counter(one["outcome"] for one in moves)),
        "lost": sum(one.error is not None for one in seen.values()),
        "errors": sorted({one.error for one in seen.values() if one.error is not None})[:5],
        "blocks_left": sum(kv_blocks_used(status).values()),
        "preemptions": sum(row["preemptions"] for row in status["instances"])
        - sum(row["preemptions"] for row in before["instances"]),
        "load_average": machine,
    }
    return found, {name: one.tokens for name, one in seen.items() if one.error is None}


def figures(seen: list[Observed], objectives_s: tuple[float, float]) -> dict[str, Any]:
    """Return the figures of the requests that came in a phase; one that failed meets no objective."""
    came = [one for one in seen if one.error is None]
    met = sum(one.ttft_s <= objectives_s[0] and one.tpot_s <= objectives_s[1] for one in came)
    return {
        "requests": len(seen),
        "objectives_met": met,
        "share_met": round(met / max(1, len(seen)), 4),
        "ttft_s": percentiles([one.ttft_s for one in came], 50, 99),
        "tpot_s": percentiles([one.tpot_s for one in came], 50, 99),
        "output_tokens": sum(len(one.tokens) for one in came),
    }


def changes_since(changes: list[dict[str, Any]], started_at: float) -> list[dict[str, Any]]:
    """Return the changes of role since the start: when each was ordered, why, and when the instance had the role."""
    made: list[dict[str, Any]] = []
    for one in changes:
        kind, _, role = one["state"].partition(" ")
        at_s = round(one["at"] - started_at, 2)
        if at_s < 0:
            continue
        if kind == "planned":
            made.append({"at_s": at_s, "instance": one["instance"], "to": role, "reason": one["why"], "had_it_s": None})
        elif kind == "role":
            last = next((m for m in reversed(made) if (m["instance"], m["to"]) == (one["instance"], role)), None)
            if last is not None:
                last["had_it_s"] = at_s
    return made


def compare(runs: list[dict[str, Any]], tokens: list[dict[str, list[int]]]) -> None:
    """Add to each run which requests have other tokens than in the first run; one that failed there cannot differ."""
    for run_, each in zip(runs, tokens, strict=True):
        run_["with_other_tokens"] = [name for name in each if each[name] != tokens[0].get(name, each[name])]


# --- the command ---


def ways_of(text: str) -> list[str]:
    """Return the ratios of a run, the first of which is fixed: the others' tokens are compared with its."""
    ways = text.split(",")
    if unknown := [way for way in ways if way not in (*_FIXED, PLANNED)]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join((*_FIXED, PLANNED))}")
    if ways[0] == PLANNED:
        raise typer.BadParameter("the first one must be fixed: the others' tokens are compared with its")
    return ways


def command(
    ways: Annotated[
        str,
        typer.Option(help="Fixed ratios of prefill + decode, and `planned`, in this order; the first one is fixed."),
    ] = f"1+2,{PLANNED},2+1",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 1,
    phase: Annotated[float, typer.Option(min=5, help="Seconds of a phase.")] = 20.0,
    count: Annotated[int, typer.Option("--phases", min=2, help="Phases: long prompts and long outputs in turns.")] = 3,
    long_prompts: Annotated[
        tuple[int, int, float], typer.Option(help="Tokens of a prompt and of an output, and requests a second.")
    ] = (320, 8, 2.2),
    long_outputs: Annotated[tuple[int, int, float], typer.Option(help="The same of the other traffic.")] = (
        24,
        160,
        0.7,
    ),
    kv_tokens: Annotated[int, typer.Option(min=512, help="KV capacity of an instance, tokens.")] = 768,
    smoothing: Annotated[float, typer.Option(min=0, help="The planner's smoothing_s.")] = 3.0,
    patience: Annotated[float, typer.Option(min=0, help="The planner's patience_s.")] = 2.0,
    cooldown: Annotated[float, typer.Option(min=0, help="The planner's cooldown_s.")] = 8.0,
    slo_ttft: Annotated[float, typer.Option(min=0, help="TTFT objective, seconds.")] = 3.0,
    slo_tpot: Annotated[float, typer.Option(min=0, help="TPOT objective, seconds.")] = 0.15,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and arrivals.")] = 0,
    dtype: Dtype = "float32",
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
) -> None:
    """Measure the planner of roles as traffic turns; status 1 where a request, a token or a KV block was lost.

    Three instances, one of which prefills at first. Its hysteresis is shorter than the default here, as the phases are.
    """
    signal_as_interrupt()
    names = ways_of(ways)
    kinds = (Traffic(*long_prompts), Traffic(*long_outputs))
    planner = {"smoothing_s": smoothing, "patience_s": patience, "cooldown_s": cooldown}
    block = 32
    longest = max(kind.prompt + kind.output for kind in kinds) + 1
    flags = ["--dtype", dtype, "--block-size", str(block), "--max-model-len", str(longest)]
    # One block is vLLM's own, for nothing.
    flags += ["--num-gpu-blocks-override", str(kv_tokens // block + 1)]
    settings = local.ClusterSettings(
        model=model,
        preset="static-least-loaded",
        port=port,
        gateway_flags=("--slo-ttft-s", str(slo_ttft), "--slo-tpot-s", str(slo_tpot)),
        vllm_flags=tuple(local_flags(flags)),
        worker_module="ares_dev.forked_engine",
    )
    load = phases(kinds, count, phase, seed)
    runs: list[dict[str, Any]] = []
    tokens: list[dict[str, list[int]]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        fork_server.running(Path(folder) / "fork-server.log", os.environ) as variables,
        mock.patch.dict(os.environ, variables),
        local.running(settings, Console(stderr=True)) as cluster,
    ):
        unbind(cluster)
        plain = next(one.command for one in cluster.processes if one.name == local.GATEWAY)
        for number in range(rounds):
            # A B, B A: a drift over time affects all alike.
            for way in names if number % 2 == 0 else names[::-1]:
                start_gateway(cluster, way, planner, plain)
                found, each = asyncio.run(run(cluster.url, model, way, load, number, (slo_ttft, slo_tpot)))
                runs.append(found)
                tokens.append(each)
    compare(runs, tokens)
    result = {
        **steady.result_header("roles", model, None, dtype, 2),
        "planner": planner,
        "phase_s": phase,
        "traffic": [{"prompt_tokens": k.prompt, "output_tokens": k.output, "rate": k.rate} for k in kinds],
        "kv_tokens": kv_tokens,
        "slo": {"ttft_s": slo_ttft, "tpot_s": slo_tpot},
        "runs": runs,
    }
    _show(runs)
    write(result, json_file)
    if any(run_[bad] for run_ in runs for bad in ("lost", "with_other_tokens", "blocks_left")):
        raise typer.Exit(1)


def _show(runs: list[dict[str, Any]]) -> None:
    table = tables.table("way", "phase", "SLOs met", "TTFT p50 s", "p99", "TPOT p50 ms", "p99", title="")
    for run_ in runs:
        for number, one in enumerate([*run_["phases"], run_["all"]], 1):
            name = str(number) if number <= len(run_["phases"]) else "all"
            times = (f"{one['ttft_s'].get(p, 0):.2f}" for p in ("p50", "p99"))
            each = (f"{1e3 * one['tpot_s'].get(p, 0):.0f}" for p in ("p50", "p99"))
            table.add_row(run_["way"], name, f"{one['objectives_met']} of {one['requests']}", *times, *each)
    tables.show(table)
    console = Console()
    for run_ in runs:
        bad = f"{run_['lost']} lost, {len(run_['with_other_tokens'])} with other tokens"
        console.print(f"{run_['way']}: {bad}, {run_['blocks_left']} KV blocks left; moves: {run_['moves'] or 'none'}")
        for one in run_["role_changes"]:
            text = (
                f"  {one['at_s']:.1f} s: {one['instance']} to {one['to']}, had by {one['had_it_s']} s: {one['reason']}"
            )
            console.print(text, markup=False, soft_wrap=True)
