"""`python -m ares_dev chaos`: load and failures of every kind, mixed by a seed; status 1 if an invariant is broken."""

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
import typer
from rich.console import Console

from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Model, Port
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.mock_engine import model as mock_model
from ares.models import resolve as models
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal.signals import signal_as_interrupt
from ares.text_files import read_text
from ares_dev.chaos.plan import STATEFUL, Plan, RequestPlan, Shape, make_plan
from ares_dev.chaos.run import Expected, executed_plan_file, run_plan

_GATEWAY = "ares_dev.chaos.gateway"
# Different prompts on real engines: each has a baseline run first.
_PROMPTS = 16
_SHOWN = 30
# Concurrent requests up to which every decision is logged; with k times as many, every k-th is.
_LOGGED = 1000


def expected_of_mock(plan: Plan, model: mock_model.MockModel) -> Expected:
    """Return a function from a request to its tokens: the output of a mock engine follows from its prompt."""

    def tokens(one: RequestPlan) -> list[int]:
        prompt = plan.token_ids(one.prompt)
        return model.continuation(prompt, one.tokens) if one.ignore_eos else model.output(prompt, one.tokens)

    return tokens


async def expected_of_real(plan: Plan, url: str, model: str) -> Expected:
    """Run every prompt undisturbed, one after the other, and return a function from a request to its tokens.

    Raises
    ------
    RuntimeError
        A request of the baseline failed.
    """
    known: dict[tuple[int, bool], list[int]] = {}
    async with aiohttp.ClientSession() as http:
        for prompt in range(plan.shape.prompts or 0):
            for parameters in ({}, STATEFUL):
                body = {
                    "model": model,
                    "prompt": plan.token_ids(prompt),
                    "max_tokens": plan.shape.longest_output,
                    "ignore_eos": True,
                    "temperature": 0,
                    "return_token_ids": True,
                    **parameters,
                }
                async with http.post(f"{url}/v1/completions", json=body) as reply:
                    if reply.status != 200:
                        raise RuntimeError(f"a request of the baseline failed: {reply.status} {await reply.text()}")
                    known[prompt, "seed" in parameters] = (await reply.json())["choices"][0]["token_ids"]
    return lambda one: known[one.prompt, "seed" in one.parameters][: one.tokens]


def command(
    seed: Annotated[int, typer.Option(help="Seed that decides the plan.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Runs, each with the next seed and a new cluster.")] = 1,
    simulate: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Use mock engines of this profile; without, real ones.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill instances; 4 mock, 1 real.")] = None,
    decode: Annotated[int | None, typer.Option(min=1, help="Decode instances; 60 mock, 2 real.")] = None,
    per_process: Annotated[
        int, typer.Option(min=2, help="Mock instances in a process, which a kill ends together.")
    ] = 8,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Concurrent requests; 1000 on mock engines, 6 on real ones.")
    ] = None,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of load and events.")] = 120.0,
    speed: Annotated[float, typer.Option(min=0.01, help="How much faster than real time mock engines are.")] = 1.0,
    kv_tokens: Annotated[int, typer.Option(min=2048, help="KV capacity of a mock instance.")] = 16384,
    longest: Annotated[int, typer.Option(min=2, help="Longest output of a mock engine, in tokens.")] = 600,
    events: Annotated[
        float | None, typer.Option(min=0.001, help="Events a second; 1 on mock engines, 0.1 on real ones.")
    ] = None,
    moves: Annotated[
        float | None, typer.Option(min=0.001, help="Commanded moves a second; 4 on mock engines, 1 on real ones.")
    ] = None,
    faults: Annotated[float, typer.Option(min=0, max=1, help="Share of the controller's decisions that raise.")] = 0.05,
    preset: Annotated[str, typer.Option(help="Policy preset to begin with.")] = "ares",
    processes: Annotated[int, typer.Option(min=1, help="Processes of the gateway; mock engines only where more.")] = 1,
    model: Model = DEFAULT_MODEL,
    port: Port = 8014,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Run this plan (printed or executed before) instead of the seed's.")
    ] = None,
    show_plan: Annotated[bool, typer.Option("--show-plan", help="Print the plan as JSON, and do nothing.")] = False,
    log_folder: Annotated[Path | None, typer.Option(help="Folder for the logs; by default a new one.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Mix load, moves, drains, kills, pauses, slow clients, a controller that raises, and telemetry faults.

    A seed decides the plan. Afterwards every token of every stream, the engines' counters, the gateway's metrics and
    the logs are checked against the invariants (docs/chaos.md).
    """
    signal_as_interrupt()
    on_mock = simulate is not None
    if processes > 1 and not on_mock:
        # Faults of their telemetry are injected by a command to the gateway, which only one of its processes gets.
        raise typer.BadParameter("several processes of the gateway need --simulate", param_hint="--processes")
    shape = Shape(
        prefill=prefill if prefill is not None else 4 if on_mock else 1,
        decode=decode or (60 if on_mock else 2),
        per_process=per_process if on_mock else 1,
        streams=streams or (1000 if on_mock else 6),
        seconds=duration,
        simulated=on_mock,
        longest_prompt=min(2000, kv_tokens // 4) if on_mock else 500,
        longest_output=min(longest, kv_tokens // 4) if on_mock else 300,
        events_per_s=events or (1.0 if on_mock else 0.1),
        moves_per_s=moves or (4.0 if on_mock else 1.0),
        prompts=None if on_mock else _PROMPTS,
    )
    plans = [make_plan(seed + n, shape) for n in range(runs)]
    if plan_file is not None:
        plans = [msgspec.json.decode(read_text(plan_file), type=Plan)]
    if show_plan:
        typer.echo(msgspec.json.format(msgspec.json.encode(plans[0]), indent=2))
        return
    console = Console(stderr=True)
    flags = ("--speed", str(speed), "--kv-tokens", str(kv_tokens)) if on_mock else ("--dtype", "float32")
    header = {
        "benchmark": "chaos",
        "engines": f"mock: {simulate}" if on_mock else "vLLM",
        "model": model,
        "shape": msgspec.to_builtins(plans[0].shape),
        "flags": list(flags),
        "failing_decisions": faults,
        "gateway_processes": processes,
        **describe(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    results: list[dict[str, Any]] = []
    for plan in plans:
        console.rule(f"seed {plan.seed}")
        settings = local.ClusterSettings(
            model=model,
            prefill=plan.shape.prefill,
            decode=plan.shape.decode,
            port=port,
            preset=preset,
            log_folder=log_folder / str(plan.seed) if log_folder is not None else None,
            simulate=simulate,
            per_process=plan.shape.per_process if on_mock else None,
            vllm_flags=flags if on_mock else tuple(local_flags(list(flags))),
            gateway_module=_GATEWAY,
            gateway_flags=(
                *("--fault-seed", str(plan.seed), "--fault-share", str(faults)),
                *(("--processes", str(processes)) if processes > 1 else ()),
            ),
        )
        results.append(_run(settings, plan, console))
        # After each run, so that a failure of the next one loses nothing.
        write({**header, "runs": results}, json_file)
    if any(result["violations"] for result in results):
        raise typer.Exit(1)


def _run(settings: local.ClusterSettings, plan: Plan, console: Console) -> dict[str, Any]:
    def report(text: str) -> None:
        console.print(text, style="dim", highlight=False, markup=False)

    folder = settings.log_folder or Path(tempfile.mkdtemp(prefix="ares-chaos-"))
    decisions = folder / "decisions.jsonl"
    every = -(-plan.shape.streams // _LOGGED)
    logs = ("--decision-log", str(decisions), "--log-every", str(every))
    settings = replace(settings, gateway_flags=(*settings.gateway_flags, *logs), log_folder=folder)
    with local.running(settings, console) as cluster:
        result: dict[str, Any] = asyncio.run(_run_and_check(cluster, plan, decisions, report))
    Console().print_json(data={name: value for name, value in result.items() if name != "violations"})
    found = result["violations"]
    for violation in found[:_SHOWN]:
        console.print(violation, style="red", highlight=False, markup=False)
    again = f"{folder}; again, with the same options: --plan {executed_plan_file(cluster, plan)}"
    verdict = f"{len(found)} violations; logs: {again}" if found else "every invariant held"
    console.print(f"seed {plan.seed}: {verdict}", style="bold red" if found else "bold green")
    return result


async def _run_and_check(
    cluster: local.Cluster, plan: Plan, decisions: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    if cluster.settings.simulate is not None:
        model = mock_model.load(models.resolve(cluster.settings.model, weights=False))
        return await run_plan(cluster, plan, expected_of_mock(plan, model), decisions, report)
    expected = await expected_of_real(plan, cluster.url, cluster.settings.model)
    return await run_plan(cluster, plan, expected, decisions, report)
