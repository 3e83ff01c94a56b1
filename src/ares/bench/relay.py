"""`ares bench relay`: the gateway's CPU time a token, next to PyPI's vllm-router on the same mock engines.

The mock engines (mock_engine/free_running.py) compute nothing. Streams are read without being decoded, so that the
client takes as little of the machine as it can.
"""

import contextlib
import shlex
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from ares import extras
from ares.bench import servers, sse
from ares.bench.environment import write
from ares.bench.options import JsonFile
from ares.bench.percentiles import percentiles
from ares.bench.servers import Server
from ares.mock_engine.free_running import TEXT
from ares.models import resolve as models
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.errors import exit_with_error
from ares.terminal.signals import signal_as_interrupt

# Time limit of a stream, in addition to one second a token.
_GRACE_S = 60.0
# Streams that measure the time to first token have just enough tokens for a second one.
_FIRST_TOKENS = 4
_ROLES = ("prefill", "decode")
_MODES = {"as_fast_as_read": "as fast as read", "paced": "paced"}


@dataclass(frozen=True, slots=True)
class _Plan:
    """The settings of a run; `first_tokens` counts single streams in each repeat."""

    model: str
    streams: int
    tokens: dict[str, int]
    interval_ms: float
    repeats: int
    first_tokens: int
    parsers: str | None = None


@dataclass(slots=True)
class _System:
    """A server of chat streams, and what was measured of it."""

    server: Server
    parses: bool = False
    role_event: bool = True
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in _MODES})
    chunks_per_read: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in _MODES})
    first_token_s: list[float] = field(default_factory=list)
    rss_mb: float = 0.0


def command(
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a stream that is sent as fast as it is read.")] = 3000,
    paced_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a paced stream.")] = 250,
    interval_ms: Annotated[float, typer.Option(min=1, help="Time between two tokens of a paced stream.")] = 20.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system, alternating.")] = 5,
    first_tokens: Annotated[
        int, typer.Option(min=1, help="Single streams in a run, for the time to first token.")
    ] = 40,
    parsers: Annotated[
        str | None,
        typer.Option(
            help="Flags of parsers, such as '--tool-call-parser hermes --enable-auto-tool-choice': measure a second "
            "gateway with them as well, by requests that have a tool."
        ),
    ] = None,
    router: servers.RouterFile = None,
    dynamo: servers.DynamoPython = None,
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of the model to imitate.")] = DEFAULT_MODEL,
    json_file: JsonFile = None,
) -> None:
    """Measure the gateway's CPU time per token chunk and the time that it adds to the first token.

    The engines are mocks that compute nothing. In one mode they write as fast as they are read, so that a read brings
    many tokens; in the other each stream gets a token at fixed intervals, as from an engine.
    """
    extras.require("psutil")
    flags = None if parsers is None else _words(parsers)
    signal_as_interrupt()
    console = Console()
    if router is None:
        console.print("no --router given: only the gateway of ARES is measured")
    counts = {"as_fast_as_read": tokens, "paced": paced_tokens}
    plan = _Plan(model, streams, counts, interval_ms, repeats, first_tokens, parsers)
    try:
        systems = _run(plan, flags, router, dynamo, console)
    except (servers.BenchError, sse.StreamError) as error:
        exit_with_error(str(error), 1)
    note = "engines are mocks that compute nothing; chunks_per_read is what the client's reads brought"
    tables.show(_table(systems))
    write(servers.result("relay", note, plan, router, systems, dynamo), json_file)


def _words(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise typer.BadParameter(f"{flags!r} cannot be read: {error}", param_hint="--parsers") from error


def _run(
    plan: _Plan, parsers: list[str] | None, router: Path | None, dynamo: Path | None, console: Console
) -> dict[str, Any]:
    """Measure the systems in turn, several times, and return the figures of each."""
    folder = models.resolve(plan.model, weights=False)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ares-relay-")))
        mocks = {role: stack.enter_context(servers.mock(role, folder, plan.model, logs)) for role in _ROLES}
        ports = {role: mock.port for role, mock in mocks.items()}
        systems = [_System(stack.enter_context(servers.gateway(ports, plan.model, logs)))]
        if parsers is not None:
            parsing = servers.gateway(ports, plan.model, logs, "ares with parsers", parsers)
            systems.append(_System(stack.enter_context(parsing), parses=True))
        if router is not None:
            systems += [
                _System(stack.enter_context(servers.vllm_router(router, ports, mode, logs)))
                for mode in ("prefill-decode", "plain")
            ]
        pace: Path | None = None
        if dynamo is not None:
            server, pace = stack.enter_context(servers.dynamo(dynamo, folder, plan.model, _ids(folder), logs))
            systems.append(_System(server, role_event=False))
        for system in systems:  # a warm-up run of everything
            uvloop.run(_read_streams(system, plan.model, plan.streams, 50))
        direct = _System(mocks["decode"])
        for n in range(plan.repeats):
            console.print(f"repeat {n + 1} of {plan.repeats}", style="dim")
            for mode, tokens in plan.tokens.items():
                _set_pace(direct.server, pace, plan.interval_ms / 1000 if mode == "paced" else 0.0)
                for system in systems:
                    _measure(system, mode, plan.model, plan.streams, tokens)
            _set_pace(direct.server, pace, 0.0)
            for _ in range(plan.first_tokens):
                for system in (direct, *systems):
                    (reply,) = uvloop.run(_read_streams(system, plan.model, 1, _FIRST_TOKENS))
                    system.first_token_s.append(sse.first_token_s(reply, _FIRST_TOKENS, role_event=system.role_event))
        return {system.server.name: _figures(system, direct) for system in systems}


def _ids(folder: Path) -> list[int]:
    """Return the tokens that the mock engines generate."""
    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids)


def _set_pace(mock: Server, dynamo_pace: Path | None, interval_s: float) -> None:
    """Let all that generate write a token of each stream every so many seconds; 0: as fast as it is read."""
    servers.set_pace(mock, interval_s)
    if dynamo_pace is not None:
        dynamo_pace.write_text(str(interval_s))


def _measure(system: _System, mode: str, model: str, streams: int, tokens: int) -> None:
    before = system.server.cpu()
    replies = uvloop.run(_read_streams(system, model, streams, tokens))
    spent = system.server.cpu() - before
    system.cpu_s[mode].append(spent / (streams * tokens) * 100_000)
    events = streams * (tokens + sse.OTHER_EVENTS - (not system.role_event))
    system.chunks_per_read[mode].append(events / sum(len(reply.data) for reply in replies))
    system.rss_mb = max(system.rss_mb, system.server.rss_mb())


_TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


async def _read_streams(system: _System, model: str, streams: int, tokens: int) -> list[sse.RawReply]:
    """Read chat streams concurrently, and check that every token arrived.

    Raises
    ------
    sse.StreamError
        A stream broke, its events are not one a token, one for the role and `[DONE]`, or it has another text than the
        others.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is gravity?"}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **({"tools": [_TOOL]} if system.parses else {}),
    }
    request = sse.request_bytes("/v1/chat/completions", body)
    replies = await sse.read_at_once([request] * streams, [system.server.port], _GRACE_S + tokens)
    for reply in replies:
        sse.check_chat(reply, tokens, role_event=system.role_event)
    sse.check_same_text(replies)
    return replies


# --- figures ---


def _figures(system: _System, direct: _System) -> dict[str, Any]:
    base = statistics.median(direct.first_token_s)
    added = percentiles([(seconds - base) * 1000 for seconds in system.first_token_s], 50, 95)
    modes = {
        mode: {
            "cpu_s_per_100k_chunks": {
                "median": round(statistics.median(runs), 3),
                "runs": [round(run, 3) for run in runs],
            },
            "chunks_per_read": round(statistics.median(system.chunks_per_read[mode]), 2),
        }
        for mode, runs in system.cpu_s.items()
    }
    first = {name: round(value, 3) for name, value in added.items()}
    return {**modes, "added_ttft_ms": first, "rss_mb": round(system.rss_mb, 1)}


def _table(systems: dict[str, Any]) -> Table:
    title = "relaying token chunks: CPU s per 100,000 chunks (chunks per read), added time to first token"
    table = tables.table("system", *_MODES.values(), "TTFT +ms", "p95", "RSS MB", title=title)
    for name, figures in systems.items():
        cells = [
            f"{figures[mode]['cpu_s_per_100k_chunks']['median']:.2f} ({figures[mode]['chunks_per_read']:.3g})"
            for mode in _MODES
        ]
        added = figures["added_ttft_ms"]
        table.add_row(name, *cells, f"{added['p50']:.2f}", f"{added['p95']:.2f}", f"{figures['rss_mb']:.0f}")
    return table
