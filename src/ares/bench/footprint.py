"""`ares bench footprint`: start-up time, memory of each process, and CPU of a cluster that does nothing."""

import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from ares import extras, local, tables
from ares.bench.environment import describe, write
from ares.engine.defaults import local_flags
from ares.model import DEFAULT_MODEL, resolve


def _processes(part: local.Part) -> list[psutil.Process]:
    leader = psutil.Process(part.process.pid)
    return [leader, *leader.children(recursive=True)]


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


def command(
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of the model.")] = DEFAULT_MODEL,
    decode: Annotated[int, typer.Option(min=1, help="Decode instances beside one prefill instance.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="How long to watch the idle cluster.")] = 30.0,
    port: Annotated[int, typer.Option(help="Port of the endpoint.")] = 8011,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure what a cluster costs before its first request."""
    extras.require("vllm", "nixl")
    resolve(model)
    settings = local.ClusterSettings(model=model, decode=decode, port=port, vllm_flags=tuple(local_flags([])))
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    with local.running(settings) as cluster:
        ready_s = time.monotonic() - start
        time.sleep(3)
        before = {part.name: _cpu_seconds(_processes(part)) for part in cluster.parts}
        began = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - began
        for part in cluster.parts:
            processes = _processes(part)
            rows.append(
                {
                    "part": part.name,
                    "idle_cpu_percent": round(100 * (_cpu_seconds(processes) - before[part.name]) / elapsed, 2),
                    "memory_pss_mb": {
                        f"{number}: {process.name()}": round(process.memory_full_info().pss / 2**20)
                        for number, process in enumerate(processes)
                    },
                }
            )
    for row in rows:
        row["total_pss_mb"] = sum(row["memory_pss_mb"].values())
    result = {
        "benchmark": "footprint",
        "model": model,
        **describe(),
        "ready_s": round(ready_s, 1),
        "idle_cpu_percent_of_one_core": round(sum(row["idle_cpu_percent"] for row in rows), 2),
        "parts": rows,
    }
    title = f"ready after {ready_s:.1f} s; idle for {elapsed:.0f} s"
    table = tables.table("part", "idle CPU %", "memory MB (PSS)", title=title)
    for row in rows:
        table.add_row(row["part"], f"{row['idle_cpu_percent']:.2f}", str(row["total_pss_mb"]))
    tables.show(table)
    write(result, json_file)
