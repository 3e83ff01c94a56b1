"""An open-loop client: sends each request at its planned time, independently of the others, and samples the cluster."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from ares.bench import sse
from ares.bench.live.load import Planned

# Longest silence of a stream before it counts as failed.
_SILENCE_S = 300.0
_SAMPLE_S = 0.25
# What is kept of an instance: its sizes, and the step time model that the gateway has fitted.
_INSTANCE_FIELDS = (
    "name",
    "role",
    "capacity_tokens",
    "kv_blocks",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "step_time_coefficients",
)


@dataclass(slots=True)
class Observed:
    """What a client saw of one request; seconds from the start of the run, `times_s` of each token."""

    name: str
    at_s: float
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    longest_gap_s: float = 0.0
    error: str | None = None
    times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Seconds from the planned arrival to the first token."""
        return self.first_s - self.at_s

    @property
    def tpot_s(self) -> float:
        """Seconds of each token after the first; 0 for a single one."""
        return (self.last_s - self.first_s) / (len(self.tokens) - 1) if len(self.tokens) > 1 else 0.0


@dataclass(slots=True)
class Run:
    """One run under a preset: what clients saw, and what the gateway's status showed."""

    preset: str
    requests: list[Observed]
    samples: list[dict[str, Any]]
    preemptions: int
    migrations: list[dict[str, Any]]
    suspensions: int
    span_s: float
    started_at: float = 0.0
    """On the gateway's wall clock."""
    instances: list[dict[str, Any]] = field(default_factory=list)
    """As the gateway showed them when the run had ended."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the gateway decided with."""


async def send_request(
    http: aiohttp.ClientSession, url: str, model: str, planned: Planned, start: float, seen: Observed | None = None
) -> Observed:
    """Send a request `planned.at_s` seconds after `start`, and return the result; `seen` is updated meanwhile."""
    seen = seen or Observed(planned.name, planned.at_s)
    await asyncio.sleep(max(0.0, start + planned.at_s - time.monotonic()))
    route = "chat/completions" if "messages" in planned.body else "completions"
    body = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **planned.body,
    }
    try:
        async with sse.open_stream(http, f"{url}/v1/{route}", body, planned.name) as chunks:
            async for chunk in chunks:
                _record(seen, chunk, time.monotonic() - start)
    except sse.StreamError as error:
        seen.error = str(error)
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
        seen.error = repr(error)
    if not seen.tokens and seen.error is None:
        seen.error = "no token"
    return seen


def _record(seen: Observed, chunk: sse.Chunk, now: float) -> None:
    if chunk.usage is not None:
        seen.prompt_tokens = chunk.usage.prompt_tokens
    tokens = chunk.tokens
    if not tokens:
        return
    if seen.tokens:
        seen.longest_gap_s = max(seen.longest_gap_s, now - seen.last_s)
    else:
        seen.first_s = now
    seen.last_s = now
    seen.tokens += tokens
    seen.times_s += [now] * len(tokens)


async def gateway_status(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """Return the gateway's status."""
    async with http.get(f"{url}/admin/v1/status") as reply:
        reply.raise_for_status()
        read: dict[str, Any] = await reply.json()
        return read


async def _sample(http: aiohttp.ClientSession, url: str, samples: list[dict[str, Any]], start: float) -> None:
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            read = await gateway_status(http, url)
            decode = [row for row in read["instances"] if row["role"] != "prefill" and "resident_tokens" in row]
            samples.append(
                {
                    "at_s": round(time.monotonic() - start, 3),
                    "kv": [row["kv_blocks_used"] / row["kv_blocks"] for row in decode],
                    "running": [row["running"] for row in decode],
                    "waiting": read["waiting"],
                    "suspended": read["suspended"],
                    # Where each request is, how far it has come, and what the engines predict of it.
                    "where": {
                        row["id"]: (row["instance"], row["state"], row["output_tokens"], row["remaining_p50"])
                        for row in read["requests"]
                    },
                }
            )
        await asyncio.sleep(_SAMPLE_S)


def _preemptions(read: dict[str, Any]) -> int:
    return sum(row.get("preemptions", 0) for row in read["instances"])


async def wait_until_idle(http: aiohttp.ClientSession, url: str) -> None:
    """Wait until nothing runs and nothing is pinned anywhere."""
    async with asyncio.timeout(_SILENCE_S):
        while True:
            read = await gateway_status(http, url)
            busy = [row for row in read["instances"] if row.get("running") or row.get("waiting") or row.get("pinned")]
            if not busy and not read["requests"]:
                return
            await asyncio.sleep(0.2)


async def run_preset(url: str, model: str, preset: str, planned: list[Planned], done: Callable[[], None]) -> Run:
    """Switch to a preset, send the load, and wait until the cluster is idle again."""
    async with sse.session(_SILENCE_S) as http:
        await wait_until_idle(http, url)
        async with http.put(f"{url}/admin/v1/preset", json={"preset": preset}) as reply:
            reply.raise_for_status()
        before = await gateway_status(http, url)
        wall, read_at = before["now"], time.monotonic()
        samples: list[dict[str, Any]] = []
        start = time.monotonic() + 0.5

        async def send(each: Planned) -> Observed:
            seen = await send_request(http, url, model, each, start)
            done()
            return seen

        watcher = asyncio.create_task(_sample(http, url, samples, start))
        try:
            requests = await asyncio.gather(*(send(each) for each in planned))
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        await wait_until_idle(http, url)
        after = await gateway_status(http, url)
    return Run(
        preset=preset,
        requests=list(requests),
        samples=samples,
        preemptions=_preemptions(after) - _preemptions(before),
        migrations=[record for record in after["migrations"] if record["started_at"] > before["now"]],
        suspensions=after["suspensions"] - before["suspensions"],
        span_s=max(each.at_s for each in planned),
        started_at=wall + start - read_at,
        instances=[{key: row.get(key) for key in _INSTANCE_FIELDS} for row in after["instances"]],
        settings=after["settings"],
    )
