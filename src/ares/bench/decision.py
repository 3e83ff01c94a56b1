"""How long one rebalancing decision takes."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from ares.bench.environment import describe
from ares.policy import PRESETS, Cluster, preset, rebalancer

app = typer.Typer(help="Benchmarks that need neither vLLM nor a GPU.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `decision` a sub-command although it is the only one."""


def sample_cluster(decode: int, requests: int, random: np.random.Generator) -> Cluster:
    """Make a cluster as telemetry would show it: uneven lengths, three quantiles, some instances far above the mean."""
    rows = decode * requests
    location = np.repeat(np.arange(decode), requests)
    skew = random.uniform(0.7, 1.3, decode)[location]
    output = np.exp(random.uniform(np.log(200), np.log(32000), rows)) * skew
    done = random.random(rows)
    resident = (200 + output * done).astype(np.int64)
    median = np.maximum(output * (1 - done), 1.0)
    sigma = random.uniform(0.1, 0.9, rows)
    remaining = median[:, None] * np.exp(sigma[:, None] * np.array([-1.2816, 0.0, 1.2816]))
    used = np.bincount(location, weights=resident, minlength=decode)
    return Cluster(
        instances=tuple(f"decode-{index}" for index in range(decode)),
        capacity_tokens=np.full(decode, int(used.max() * 1.4), np.int64),
        promised_tokens=np.zeros(decode, np.int64),
        open=np.ones(decode, np.bool_),
        requests=np.arange(rows),
        location=location,
        resident_tokens=resident,
        movable=np.ones(rows, np.bool_),
        remaining_tokens=remaining,
        step_base_s=np.full(decode, 0.0105),
        step_request_s=np.full(decode, 2e-5),
        step_token_s=np.full(decode, 3.3e-8),
        block_tokens=16,
    )


def measure(decode: int, requests: int, decisions: int, name: str, seed: int, progress: bool) -> dict[str, Any]:
    """Time decisions, each on a different cluster, so that no cache of an earlier one helps.

    Times are wall-clock times; `cpu_...` are CPU times of the thread, which other processes do not affect.
    """
    chosen = preset(name)
    policy = rebalancer(chosen.rebalance, chosen.rebalance_settings)
    random = np.random.default_rng(seed)
    clusters = [sample_cluster(decode, requests, random) for _ in range(min(decisions, 16))]
    policy.decide(clusters[0])  # imports and first-touch memory are not part of a decision
    seconds, busy, moves = [], [], 0
    for turn in track(range(decisions), description="deciding", disable=not progress, console=Console(stderr=True)):
        cluster = clusters[turn % len(clusters)]
        before, busy_before = time.perf_counter(), time.thread_time()
        ordered = policy.decide(cluster)
        seconds.append(time.perf_counter() - before)
        busy.append(time.thread_time() - busy_before)
        moves += len(ordered)
    return {
        "preset": name,
        "decode": decode,
        "requests": requests,
        "decisions": decisions,
        "p50_ms": float(np.percentile(seconds, 50) * 1e3),
        "p99_ms": float(np.percentile(seconds, 99) * 1e3),
        "cpu_p50_ms": float(np.percentile(busy, 50) * 1e3),
        "cpu_p99_ms": float(np.percentile(busy, 99) * 1e3),
        "moves": moves / decisions,
        "horizon_points": getattr(chosen.rebalance_settings, "points", None),
        "quantiles": 3,
    }


@app.command()
def decision(
    decode: Annotated[int, typer.Option(help="Decode instances.", min=2)] = 256,
    requests: Annotated[int, typer.Option(help="Running requests on each instance.", min=1)] = 128,
    decisions: Annotated[int, typer.Option(help="How many decisions to time.", min=1)] = 200,
    preset_name: Annotated[str, typer.Option("--preset", help="Preset whose rebalancer is timed.")] = "ares",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled clusters.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the result here ('-': standard output).")
    ] = None,
) -> None:
    """Time the rebalancer on sampled clusters, with three quantiles a request and a 64-point horizon."""
    if preset_name not in PRESETS:
        typer.echo(f"--preset: unknown preset {preset_name!r}; known: {', '.join(PRESETS)}", err=True)
        raise typer.Exit(2)
    result = measure(decode, requests, decisions, preset_name, seed, progress=True)
    text = json.dumps({**result, **describe()}, indent=2)
    if json_path is None:
        typer.echo(
            f"p50 {result['p50_ms']:.2f} ms, p99 {result['p99_ms']:.2f} ms "
            f"(CPU time: {result['cpu_p50_ms']:.2f}, {result['cpu_p99_ms']:.2f}), "
            f"{result['moves']:.1f} moves a decision"
        )
    elif str(json_path) == "-":
        typer.echo(text)
    else:
        json_path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
