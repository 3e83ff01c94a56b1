"""`python -m ares_dev footprint`: start-up time, memory of each process, and CPU of a cluster that does nothing."""

import time
from dataclasses import replace
from typing import Annotated, Any

import psutil
import typer

from ares import extras
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Model, Port
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL, resolve
from ares.terminal import tables


def _processes(managed: local.ManagedProcess) -> list[psutil.Process]:
    leader = psutil.Process(managed.popen.pid)
    return [leader, *leader.children(recursive=True)]


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


def _memory(managed: local.ManagedProcess) -> dict[str, Any]:
    """Return the memory of a part in MB: PSS of each process and of all, RSS of all (shared pages count for each)."""
    infos = {f"{n}: {process.name()}": process.memory_full_info() for n, process in enumerate(_processes(managed))}
    return {
        "memory_pss_mb": {name: round(info.pss / 2**20) for name, info in infos.items()},
        "total_pss_mb": round(sum(info.pss for info in infos.values()) / 2**20),
        "total_rss_mb": round(sum(info.rss for info in infos.values()) / 2**20),
    }


def measure(settings: local.ClusterSettings, seconds: float) -> dict[str, Any]:
    """Start a cluster, measure it while idle for `seconds`, and stop it."""
    start = time.monotonic()
    with local.running(settings) as cluster:
        ready_s = time.monotonic() - start
        time.sleep(3)
        before = {managed.name: _cpu_seconds(_processes(managed)) for managed in cluster.processes}
        began = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - began
        rows = [
            {
                "part": managed.name,
                "idle_cpu_percent": round(
                    100 * (_cpu_seconds(_processes(managed)) - before[managed.name]) / elapsed, 2
                ),
                **_memory(managed),
            }
            for managed in cluster.processes
        ]
    return {
        "preset": settings.preset,
        "ready_s": round(ready_s, 1),
        "idle_cpu_percent_of_one_core": round(sum(row["idle_cpu_percent"] for row in rows), 2),
        "parts": rows,
    }


def command(
    model: Model = DEFAULT_MODEL,
    decode: Annotated[int, typer.Option(min=1, help="Decode instances, with one prefill instance.")] = 2,
    preset: Annotated[
        list[str] | None, typer.Option(help="Policy preset of the gateway, ares by default; repeat for a cluster each.")
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Use mock engines of this profile, which start within seconds."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long to watch the idle cluster.")] = 30.0,
    port: Port = 8011,
    json_file: JsonFile = None,
) -> None:
    """Measure start-up time, memory and idle CPU of a cluster before its first request."""
    if simulate is None:
        extras.require("vllm", "nixl")
    resolve(model, weights=simulate is None)
    flags = tuple(local_flags([])) if simulate is None else ()
    settings = local.ClusterSettings(model=model, decode=decode, port=port, vllm_flags=flags, simulate=simulate)
    runs = []
    for name in preset or [settings.preset]:
        run = measure(replace(settings, preset=name), seconds)
        title = f"preset {name}: ready after {run['ready_s']} s; idle for {seconds:g} s"
        table = tables.table("part", "idle CPU %", "memory MB (PSS)", "MB (RSS)", title=title)
        for row in run["parts"]:
            cells = f"{row['idle_cpu_percent']:.2f}", str(row["total_pss_mb"]), str(row["total_rss_mb"])
            table.add_row(row["part"], *cells)
        tables.show(table)
        runs.append(run)
    write({"benchmark": "footprint", "model": model, **describe(), "runs": runs}, json_file)
