"""`ares bench first-tokens`: many chats that come at once, through gateways and routers and without any.

The mock engines (mock_engine/free_running.py) prefill in no time, so that what a first token takes is the time of
gateway, client and machine.
"""

import contextlib
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from ares import extras
from ares.bench import servers, sse
from ares.bench.environment import write
from ares.bench.options import JsonFile
from ares.bench.percentiles import milliseconds
from ares.bench.servers import Server
from ares.models import resolve as models
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.errors import exit_with_error
from ares.terminal.signals import signal_as_interrupt

# Time limit of a round, in addition to one second a token.
_GRACE_S = 120.0
# Streams before the first round.
_WARM_UP = 50
# What is shown of each round, and of all by the median.
_FIGURES = ("p50_ms", "p99_ms", "longest_ms", "cpu_ms_per_stream")


@dataclass(frozen=True, slots=True)
class _Plan:
    """The settings of a run."""

    model: str
    streams: int
    tokens: int
    interval_ms: float
    rounds: int
    processes: list[int]


@dataclass(slots=True)
class _System:
    """A server, what each round has shown of it, and its memory: of each process, before the first request and last."""

    server: Server
    rounds: list[dict[str, float]] = field(default_factory=list)
    idle_pss_mb: list[float] = field(default_factory=list)
    pss_mb: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return the median of each figure, the rounds, and the memory in MB (PSS) of each process."""
        return {
            "median": {name: round(statistics.median(one[name] for one in self.rounds), 3) for name in _FIGURES},
            "rounds": self.rounds,
            "idle_pss_mb": [round(size, 1) for size in self.idle_pss_mb],
            "pss_mb": [round(size, 1) for size in self.pss_mb],
        }


def command(
    streams: Annotated[int, typer.Option(min=1, help="Chats that come at once.")] = 1000,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a stream.")] = 40,
    interval_ms: Annotated[float, typer.Option(min=1, help="Time between two tokens of a stream.")] = 50.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each system, alternating.")] = 5,
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="Processes of the gateway, 1 by default; repeat for a gateway each.")
    ] = None,
    router: servers.RouterFile = None,
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of the model to imitate.")] = DEFAULT_MODEL,
    json_file: JsonFile = None,
) -> None:
    """Measure the first tokens of many chats that come at once, with a gateway and without; CPU time and memory too.

    Without a gateway, or behind a router in its plain mode, a chat uses one mock instance, otherwise two. Memory is
    that of each process (PSS), before the first chat and after the last round.
    """
    extras.require("psutil")
    signal_as_interrupt()
    console = Console()
    plan = _Plan(model, streams, tokens, interval_ms, rounds, processes or [1])
    try:
        systems = _run(plan, router, console)
    except (servers.BenchError, sse.StreamError) as error:
        exit_with_error(str(error), 1)
    note = "engines are mocks that compute nothing, on the machine of gateway and client"
    tables.show(_table(plan, systems))
    write(servers.result("first-tokens", note, plan, router, systems), json_file)


def _run(plan: _Plan, router: Path | None, console: Console) -> dict[str, Any]:
    """Measure the systems in turn, several times, and return the figures of each."""
    folder = models.resolve(plan.model, weights=False)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ares-first-tokens-")))
        mocks = {
            role: stack.enter_context(servers.mock(role, folder, plan.model, logs)) for role in ("prefill", "decode")
        }
        ports = {role: mock.port for role, mock in mocks.items()}
        started = [mocks["decode"]]
        for count in plan.processes:
            name = "ares" if count == 1 else f"ares, {count} processes"
            flags = () if count == 1 else ("--processes", str(count))
            started.append(stack.enter_context(servers.gateway(ports, plan.model, logs, name, flags)))
        if router is not None:
            started += [
                stack.enter_context(servers.vllm_router(router, ports, mode, logs))
                for mode in ("prefill-decode", "plain")
            ]
        systems = [_System(server, idle_pss_mb=server.pss_mb()) for server in started]
        servers.set_pace(mocks["decode"], plan.interval_ms / 1000)
        for system in systems:
            _round(system.server, plan, _WARM_UP)
        for n in range(plan.rounds):
            console.print(f"round {n + 1} of {plan.rounds}", style="dim")
            for system in systems:
                system.rounds.append(_round(system.server, plan, plan.streams))
        for system in systems:
            system.pss_mb = system.server.pss_mb()
        return {system.server.name: system.figures() for system in systems}


def _round(server: Server, plan: _Plan, streams: int) -> dict[str, float]:
    """Send so many chats at once, read them to their ends, and return the figures.

    Raises
    ------
    sse.StreamError
        A stream broke, has too few or too many tokens, or another text than the others.
    """
    requests = [
        sse.request_bytes(
            "/v1/chat/completions",
            {
                "model": plan.model,
                "messages": [{"role": "user", "content": f"What is gravity, in {number} words?"}],
                "max_tokens": plan.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            },
        )
        for number in range(streams)
    ]
    before = server.cpu()
    replies = uvloop.run(sse.read_at_once(requests, [server.port], _GRACE_S + plan.tokens))
    spent = server.cpu() - before
    shown = milliseconds([sse.first_token_s(reply, plan.tokens) for reply in replies], 50, 99, 100, digits=1)
    sse.check_same_text(replies)
    return {
        "p50_ms": shown["p50"],
        "p99_ms": shown["p99"],
        "longest_ms": shown["max"],
        "cpu_ms_per_stream": round(spent / streams * 1000, 3),
    }


def _table(plan: _Plan, systems: dict[str, Any]) -> Table:
    title = f"{plan.streams} chats at once, a token each {plan.interval_ms:g} ms: medians of {plan.rounds} rounds"
    columns = ("first token p50 ms", "p99", "longest", "CPU ms a stream", "MB, idle", "MB (PSS)")
    table = tables.table("system", *columns, title=title)
    for name, figures in systems.items():
        median = figures["median"]
        table.add_row(
            name,
            *(f"{median[figure]:.4g}" for figure in _FIGURES),
            *(" + ".join(f"{size:.0f}" for size in figures[part]) for part in ("idle_pss_mb", "pss_mb")),
        )
    return table
