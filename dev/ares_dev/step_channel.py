"""`python -m ares_dev step-channel`: what one message per decode step could save, instead of one HTTP chunk per token.

vLLM's API server writes a chunk for each token of each stream, and the gateway reads each. A channel from the scheduler
of the engine to the gateway would carry the new tokens of all requests of a step in one message, beside the API server,
which would still take the requests and follow their outputs, but write none. How much that could save at most is the
difference between streams with a chunk for each token and the same requests answered as a whole.
"""

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console

from ares import extras
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Model
from ares.bench.steady import machine_load
from ares.engine.defaults import local_flags
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.generate import EngineClient, http_client
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.errors import exit_with_error

Way = Literal["token", "many", "whole"]
# A chunk for each token; chunks of `_MANY` tokens (`stream_interval`); one reply at the end.
_WAYS: tuple[Way, ...] = ("token", "many", "whole")
_MANY = 64
_PROMPT_TOKENS, _LARGEST_ID = 32, 1000
# Messages that are encoded and decoded to find what one takes.
_MESSAGES = 2000


class _Row(msgspec.Struct, array_like=True):
    key: str
    position: int
    token_ids: list[int]


class _Step(msgspec.Struct, array_like=True):
    """What a step channel would carry: of each running request its new tokens, and where in its output they stand."""

    number: int
    rows: list[_Row]


@dataclass(frozen=True, slots=True)
class Run:
    """CPU seconds of the API server, of the engine's other processes and of the reader; and how long it took."""

    api_s: float
    engine_s: float
    reader_s: float
    wall_s: float


def _cpu_seconds(process: local.ManagedProcess) -> tuple[float, float]:
    """Return the CPU seconds of an instance's API server, and of the processes that it has started."""
    import psutil

    server = psutil.Process(process.popen.pid)
    each = [sum(one.cpu_times()[:2]) for one in (server, *server.children(recursive=True))]
    return each[0], sum(each[1:])


async def _generate(engine: EngineClient, key: str, prompt: list[int], tokens: int, way: Way) -> int:
    """Generate one output; return how many tokens came."""
    interval = {"stream_interval": _MANY} if way == "many" else {}
    sampling = Sampling({"temperature": 0.0, "ignore_eos": True, **interval}, tokens)
    body = sampling.decode_request(key, prompt, [], None)
    if way == "whole":
        delta, _ = await engine.complete(body)
        return len(delta.token_ids or [])
    came = 0

    def take(batch: list[Delta]) -> bool:
        # As a session takes them: its task is woken for the first and the last tokens alone.
        nonlocal came
        if batch[-1].finish_reason is not None:
            return False
        came += sum(len(delta.token_ids or []) for delta in batch)
        return True

    stream = await engine.stream(body)
    try:
        while batch := await stream.batch(take):
            came += sum(len(delta.token_ids or []) for delta in batch)
    finally:
        stream.close()
    return came


async def _run(process: local.ManagedProcess, streams: int, tokens: int, way: Way) -> Run:
    """Run so many requests at once; EngineLostError where one has other than so many tokens."""
    generator = random.Random(streams)  # noqa: S311 - a workload, not a secret
    prompts = [[generator.randrange(3, _LARGEST_ID) for _ in range(_PROMPT_TOKENS)] for _ in range(streams)]
    name = f"{way}-{time.monotonic_ns()}"
    async with http_client() as http:
        engine = EngineClient(http, process.url)
        api_s, engine_s = _cpu_seconds(process)
        reader_s, began = time.process_time(), time.monotonic()
        came = await asyncio.gather(
            *(_generate(engine, f"{name}-{n}", prompt, tokens, way) for n, prompt in enumerate(prompts))
        )
        wall_s, reader_s = time.monotonic() - began, time.process_time() - reader_s
        after = _cpu_seconds(process)
        engine.close()
    if set(came) != {tokens}:
        raise EngineLostError(f"{tokens} tokens of each request were expected, and {sorted(set(came))} came")
    return Run(after[0] - api_s, after[1] - engine_s, reader_s, wall_s)


def _message_s(streams: int) -> float:
    """Return the seconds to encode and to decode the message of one step."""
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(_Step).decode
    step = _Step(1, [_Row(f"gateway/0123456789/{n}", 1000 + n, [n]) for n in range(streams)])
    began = time.process_time()
    for _ in range(_MESSAGES):
        decode(encode(step))
    return (time.process_time() - began) / _MESSAGES


def case(streams: int, tokens: int, runs: dict[Way, list[Run]]) -> dict[str, Any]:
    """Return the figures of so many streams: medians over the rounds, CPU by 1,000 tokens."""
    thousands = streams * tokens / 1000

    def by_way(value: str, divisor: float) -> dict[str, float]:
        found = {way: statistics.median(getattr(run, value) for run in done) for way, done in runs.items()}
        return {way: round(1000 * seconds / divisor, 3) for way, seconds in found.items()}

    api_ms = by_way("api_s", thousands)
    reader_ms = by_way("reader_s", thousands)
    message_ms = round(1000 * _message_s(streams) * tokens / thousands, 3)
    return {
        "streams": streams,
        "api_server_cpu_ms_per_1000_tokens": api_ms,
        "engine_cpu_ms_per_1000_tokens": by_way("engine_s", thousands),
        "gateway_reading_cpu_ms_per_1000_tokens": reader_ms,
        "message_cpu_ms_per_1000_tokens": message_ms,
        "step_ms": by_way("wall_s", tokens),
        "most_saved_cpu_ms_per_1000_tokens": {
            "api_server": round(api_ms["token"] - api_ms["whole"], 3),
            "gateway": round(reader_ms["token"] - reader_ms["whole"] - message_ms, 3),
        },
    }


async def measure(
    process: local.ManagedProcess, each: list[int], tokens: int, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """Return the figures of each number of requests, in rounds of all ways in turns; the errors are those of `_run`."""
    cases = []
    for streams in each:
        runs: dict[Way, list[Run]] = {way: [] for way in _WAYS}
        for number in range(rounds + 1):
            console.print(f"{streams} streams, round {number} of {rounds}", style="dim")
            for way in _WAYS:
                run = await _run(process, streams, tokens, way)
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
    """Measure what one message per decode step could save at most, instead of one HTTP chunk per token.

    A real instance of vLLM answers the same requests with a chunk for each token, with chunks of 64 tokens, and as a
    whole. Compared are the CPU time of its API server and of the gateway's client, which reads the chunks here, and
    the time of a step.
    """
    extras.require("vllm", "psutil")
    console = Console(stderr=True)
    settings = local.ClusterSettings(model=model, vllm_flags=tuple(local_flags([])))
    load = machine_load()
    with local.workers_only(settings, console) as cluster:
        cluster.start_worker("instance", "both", None, ("--connector", "none", "--predictor", "none"))
        cluster.await_workers()
        try:
            cases = asyncio.run(measure(cluster.workers[0], streams or [8, 32], tokens, rounds, console))
        except (EngineLostError, EngineRefusedError) as error:
            exit_with_error(str(error), 1)
    table = tables.table(
        "streams",
        *(f"API server, {way}" for way in _WAYS),
        "gateway, token",
        "whole",
        "message",
        *(f"step ms, {way}" for way in _WAYS),
        title="CPU ms per 1,000 tokens, and how long a step takes",
    )
    for one in cases:
        api, read, step = (
            one[name]
            for name in ("api_server_cpu_ms_per_1000_tokens", "gateway_reading_cpu_ms_per_1000_tokens", "step_ms")
        )
        table.add_row(
            str(one["streams"]),
            *(f"{api[way]:.0f}" for way in _WAYS),
            *(f"{read[way]:.1f}" for way in ("token", "whole")),
            f"{one['message_cpu_ms_per_1000_tokens']:.2f}",
            *(f"{step[way]:.2f}" for way in _WAYS),
        )
    tables.show(table)
    settings_used = {"tokens": tokens, "rounds": rounds, "tokens_of_a_chunk_of_many": _MANY}
    result = {"benchmark": "step-channel", "model": model, "settings": settings_used, **describe()}
    write({**result, "load_average_before": load, "cases": cases}, json_file)
