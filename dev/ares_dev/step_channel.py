"""`python -m ares_dev step-channel`: what one message per decode step saves, instead of one HTTP chunk per token.

Without the step channel (`messages.StepTokens`), vLLM's API server writes a chunk for each token of each stream, and
the gateway reads each. With it, the scheduler's process sends the new tokens of all requests of a step in one message,
and the API server writes larger chunks. Beside both: the same requests answered as a whole, the least that is possible.
"""

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from ares import extras
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Model
from ares.bench.steady import machine_load
from ares.check import instances
from ares.engine.defaults import local_flags
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance
from ares.gateway.tuning import DEFAULT
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.errors import exit_with_error

Way = Literal["token", "step", "whole"]
# A chunk for each token; the step channel, with chunks of `Tuning.chunk_tokens`; one reply at the end.
_WAYS: tuple[Way, ...] = ("token", "step", "whole")
_PROMPT_TOKENS, _LARGEST_ID = 32, 1000
_GATEWAY = "step-channel"


@dataclass(frozen=True, slots=True)
class Run:
    """CPU seconds of the API server, of the engine's other processes and of the reader; and how long it took.

    `early` is the share of the tokens that came over the step channel.
    """

    api_s: float
    engine_s: float
    reader_s: float
    wall_s: float
    early: float


def _cpu_seconds(process: local.ManagedProcess) -> tuple[float, float]:
    """Return the CPU seconds of an instance's API server, and of the processes that it has started."""
    import psutil

    server = psutil.Process(process.popen.pid)
    each = [sum(one.cpu_times()[:2]) for one in (server, *server.children(recursive=True))]
    return each[0], sum(each[1:])


class _Taken:
    """Counts tokens as a session takes them: its task is woken for the first and the last ones alone."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, batch: list[Delta]) -> None:
        self.tokens += sum(len(delta.token_ids or []) for delta in batch)

    def take(self, batch: list[Delta]) -> bool:
        if batch[-1].finish_reason is not None:
            return False
        self.add(batch)
        return True

    def take_token(self, _: int) -> bool:
        self.tokens += 1
        return True


async def _generate(instance: Instance, key: str, prompt: list[int], tokens: int, way: Way) -> tuple[int, int]:
    """Generate one output; return how many tokens came, and how many of them over the step channel."""
    sampling = Sampling({"temperature": 0.0, "ignore_eos": True}, tokens)
    body = sampling.decode_request(key, prompt, [], None)
    if way == "whole":
        delta, _ = await instance.engine.complete(body)
        return len(delta.token_ids or []), 0
    taken = _Taken()
    stream = await instance.engine.stream(body, step_tokens=way == "step" and instance.sends_step_tokens)
    try:
        while batch := await stream.batch(taken):
            taken.add(batch)
    finally:
        stream.close()
    return taken.tokens, stream.early_tokens


async def _run(process: local.ManagedProcess, instance: Instance, streams: int, tokens: int, way: Way) -> Run:
    """Run so many requests at once; EngineLostError where one has other than so many tokens."""
    generator = random.Random(streams)  # noqa: S311 - a workload, not a secret
    prompts = [[generator.randrange(3, _LARGEST_ID) for _ in range(_PROMPT_TOKENS)] for _ in range(streams)]
    name = f"{_GATEWAY}/{way}-{time.monotonic_ns()}"
    api_s, engine_s = _cpu_seconds(process)
    reader_s, began = time.process_time(), time.monotonic()
    came = await asyncio.gather(
        *(_generate(instance, f"{name}/{n}", prompt, tokens, way) for n, prompt in enumerate(prompts))
    )
    wall_s, reader_s = time.monotonic() - began, time.process_time() - reader_s
    after = _cpu_seconds(process)
    if {all_tokens for all_tokens, _ in came} != {tokens}:
        raise EngineLostError(f"{tokens} tokens of each request were expected, and {sorted(came)} came")
    early = sum(early for _, early in came) / (streams * tokens)
    return Run(after[0] - api_s, after[1] - engine_s, reader_s, wall_s, early)


def case(streams: int, tokens: int, runs: dict[Way, list[Run]]) -> dict[str, Any]:
    """Return the figures of so many streams: medians over the rounds, CPU by 1,000 tokens."""
    thousands = streams * tokens / 1000

    def by_way(value: str, divisor: float) -> dict[str, float]:
        found = {way: statistics.median(getattr(run, value) for run in done) for way, done in runs.items()}
        return {way: round(1000 * seconds / divisor, 3) for way, seconds in found.items()}

    return {
        "streams": streams,
        "api_server_cpu_ms_per_1000_tokens": by_way("api_s", thousands),
        "engine_cpu_ms_per_1000_tokens": by_way("engine_s", thousands),
        "gateway_reading_cpu_ms_per_1000_tokens": by_way("reader_s", thousands),
        "step_ms": by_way("wall_s", tokens),
        "share_over_the_step_channel": round(statistics.median(run.early for run in runs["step"]), 3),
    }


async def measure(
    process: local.ManagedProcess, each: list[int], tokens: int, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """Return the figures of each number of requests, in rounds of all ways in turns; the errors are those of `_run`."""
    cases = []
    async with instances.connected([process.url], None, None, None, _GATEWAY) as (cluster, _):
        if not cluster.found:
            raise EngineLostError("the instance does not report")
        instance = cluster.found[0].instance
        for streams in each:
            runs: dict[Way, list[Run]] = {way: [] for way in _WAYS}
            for number in range(rounds + 1):
                console.print(f"{streams} streams, round {number} of {rounds}", style="dim")
                for way in _WAYS:
                    run = await _run(process, instance, streams, tokens, way)
                    if number:  # the first round warms up
                        runs[way].append(run)
            cases.append(case(streams, tokens, runs))
    return cases


def command(
    model: Model = DEFAULT_MODEL,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="Concurrent requests, 8 and 32 by default; repeat for several.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Output tokens of a request.")] = 250,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each way, in turns.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure what one message per decode step saves, instead of one HTTP chunk per token.

    A real instance of vLLM answers the same requests with a chunk for each token, over the step channel, and as a
    whole. Compared are the CPU time of its API server, of its engine and of the gateway's reading, and the time of a
    step.
    """
    extras.require("vllm", "psutil")
    console = Console(stderr=True)
    settings = local.ClusterSettings(model=model, vllm_flags=tuple(local_flags([])))
    load = machine_load()
    with local.workers_only(settings, console) as cluster:
        cluster.start_worker("instance", "both", None, ("--predictor", "none"))
        cluster.await_workers()
        try:
            cases = asyncio.run(measure(cluster.workers[0], streams or [8, 32], tokens, rounds, console))
        except (EngineLostError, EngineRefusedError) as error:
            exit_with_error(str(error), 1)
    figures = {
        "API server": "api_server_cpu_ms_per_1000_tokens",
        "engine": "engine_cpu_ms_per_1000_tokens",
        "reading": "gateway_reading_cpu_ms_per_1000_tokens",
        "step ms": "step_ms",
    }
    columns = [f"{name}, {way}" for name in figures for way in _WAYS]
    table = tables.table("streams", *columns, title="CPU ms per 1,000 tokens, and how long a step takes")
    for one in cases:
        table.add_row(str(one["streams"]), *(f"{one[name][way]:.3g}" for name in figures.values() for way in _WAYS))
    tables.show(table)
    settings_used = {"tokens": tokens, "rounds": rounds, "tokens_of_a_chunk": DEFAULT.chunk_tokens}
    result = {"benchmark": "step-channel", "model": model, "settings": settings_used, **describe()}
    write({**result, "load_average_before": load, "cases": cases}, json_file)
