"""Counters of vLLM's NIXL connector, read from the metrics of instances."""

import re
from collections import Counter
from collections.abc import Sequence

import aiohttp

# Those that must not rise.
FAULTS = ("nixl_num_failed_transfers", "nixl_num_kv_expired_reqs", "nixl_num_failed_notifications")
BYTES, SECONDS = "nixl_bytes_transferred_sum", "nixl_xfer_time_seconds_sum"


async def sums(http: aiohttp.ClientSession, url: str, names: Sequence[str]) -> dict[str, float]:
    """Return the sums of counters over an instance's engines, by their names without ``vllm:``; 0 for one it lacks."""
    async with http.get(f"{url}/metrics") as reply:
        text = await reply.text()
    return {name: sum(_values(text, name)) for name in names}


async def faults(http: aiohttp.ClientSession, urls: Sequence[str]) -> dict[str, float]:
    """Return the sums of `FAULTS` over all instances."""
    found: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
    for url in urls:
        found.update(await sums(http, url, FAULTS))
    return dict(found)


def _values(text: str, name: str) -> list[float]:
    values = re.findall(rf"^vllm:{name}(?:_total)?\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return [float(value) for value in values]
