"""Samples of a soak: each process from outside, the gateway and the engines by their status and counters."""

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from ares.bench.live import client
from ares.bench.nixl_counters import faults
from ares.local_cluster import cluster as local
from ares.protocol.fields import COUNTERS_ROUTE

_MB = 1 << 20
_OF_INSTANCES = ("kv_blocks_used", "pinned", "running", "waiting")


@dataclass(frozen=True, slots=True)
class Sample:
    """All figures of one moment, by `part/figure`; `idle` where no request ran."""

    at_s: float
    idle: bool
    values: dict[str, float]


async def take_sample(http: aiohttp.ClientSession, cluster: local.Cluster, start: float, *, idle: bool) -> Sample:
    """Take a sample of everything."""
    at_s = time.monotonic() - start
    values = await asyncio.to_thread(_of_processes, cluster.processes)
    read = await client.gateway_status(http, cluster.url)
    values["gateway/tasks"] = read["process"]["tasks"]
    values["gateway/sequences"] = len(read["requests"])
    for row in read["instances"]:
        values |= {f"{row['name']}/{name}": row[name] for name in _OF_INSTANCES if name in row}
    for instance, held in read["connectors"].items():
        values |= {f"{instance}/{name}": count for name, count in held.items()}
    return Sample(at_s, idle, values)


def columns(samples: list[Sample]) -> dict[str, list[float | bool | None]]:
    """Return samples as lists by name, `at_s` and `idle` first; None where a figure was not there."""
    names = sorted({name for each in samples for name in each.values})
    return {
        "at_s": [round(each.at_s, 1) for each in samples],
        "idle": [each.idle for each in samples],
        **{name: [each.values.get(name) for each in samples] for name in names},
    }


def _of_processes(processes: list[local.ManagedProcess]) -> dict[str, float]:
    """Return memory, descriptors and threads of each managed, its child processes included."""
    values: dict[str, float] = {}
    for managed in processes:
        leader = psutil.Process(managed.popen.pid)
        found = [_of_process(leader)]
        for child in leader.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # it has ended meanwhile
                found.append(_of_process(child))
        for name in found[0]:
            values[f"{managed.name}/{name}"] = round(sum(each[name] for each in found), 2)
    return values


def _of_process(process: psutil.Process) -> dict[str, float]:
    memory = process.memory_full_info()
    folder = Path(f"/proc/{process.pid}/fd")
    kinds = [_kind(file) for file in folder.iterdir()]
    return {
        "rss_mb": memory.rss / _MB,
        "pss_mb": memory.pss / _MB,
        "descriptors": len(kinds),
        "sockets": sum(kind.startswith("socket:") for kind in kinds),
        "threads": process.num_threads(),
    }


def _kind(file: Path) -> str:
    try:
        return os.readlink(file)  # noqa: PTH115 - no file, but a word such as socket:[123]
    except OSError:  # closed meanwhile
        return ""


async def engine_faults(http: aiohttp.ClientSession, cluster: local.Cluster) -> dict[str, float]:
    """Return the engines' own counters of transfers that failed and of leases that expired."""
    urls = [url for worker in cluster.workers for url in worker.instances.values()]
    if cluster.settings.simulate is None:
        return await faults(http, urls)
    counters: list[dict[str, Any]] = []
    for url in urls:
        async with http.get(f"{url}{COUNTERS_ROUTE}") as reply:
            counters.append(await reply.json())
    names = {"kv_expired": "pins_expired", "failed_transfers": "pulls_failed"}
    return {ours: float(sum(each[theirs] for each in counters)) for ours, theirs in names.items()}
