"""`ares bench relay`: the gateway's CPU time a token, next to PyPI's vllm-router on the same mock engines.

The mock engines (mock_engine/free_running.py) compute nothing. Streams are read without being decoded, so that the
client takes as little of the machine as it can.
"""

import contextlib
import importlib.metadata
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from ares import extras
from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile
from ares.bench.percentiles import percentiles
from ares.free_ports import free_port
from ares.models import resolve as models
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal import tables
from ares.terminal.errors import exit_with_error
from ares.terminal.http_client import open_direct
from ares.terminal.signals import signal_as_interrupt

if TYPE_CHECKING:
    import psutil

_START_TIMEOUT_S = 60.0
# Time limit of a stream, in addition to one second a token.
_GRACE_S = 60.0
# Streams that measure the time to first token have just enough tokens for a second one.
_FIRST_TOKENS = 4
_MODES = {"as_fast_as_read": "as fast as read", "paced": "paced"}


class BenchError(RuntimeError):
    """A measurement cannot be made; the message says why."""


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
    """Something that serves chat streams, and what was measured of it."""

    name: str
    port: int
    process: "psutil.Process"
    parses: bool = False
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in _MODES})
    chunks_per_read: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in _MODES})
    first_token_s: list[float] = field(default_factory=list)
    rss_mb: float = 0.0

    def cpu(self) -> float:
        """User and system seconds of the process and its children."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family)

    def observe_memory(self) -> None:
        """Keep the largest resident size seen."""
        family = [self.process, *self.process.children(recursive=True)]
        self.rss_mb = max(self.rss_mb, sum(process.memory_info().rss for process in family) / 2**20)


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
    router: Annotated[Path | None, typer.Option(help="PyPI's vllm-router executable, to be measured as well.")] = None,
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of the model to imitate.")] = DEFAULT_MODEL,
    json_file: JsonFile = None,
) -> None:
    """Measure the gateway's CPU time per token chunk and the time that it adds to the first token.

    The engines are mocks that compute nothing. In one mode they write as fast as they are read, so that a read brings
    many tokens; in the other each stream gets a token at fixed intervals, as from an engine.
    """
    extras.require("psutil")
    signal_as_interrupt()
    console = Console()
    if router is None:
        console.print("no --router given: only the gateway of ARES is measured")
    counts = {"as_fast_as_read": tokens, "paced": paced_tokens}
    plan = _Plan(model, streams, counts, interval_ms, repeats, first_tokens, parsers)
    try:
        systems = _run(plan, router, console)
    except (BenchError, sse.StreamError) as error:
        exit_with_error(str(error), 1)
    described = describe()
    described["versions"] |= _versions(router)
    result = {
        "benchmark": "relay",
        "note": "engines are mocks that compute nothing; chunks_per_read is what the client's reads brought",
        "settings": asdict(plan),
        **described,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "systems": systems,
    }
    tables.show(_table(systems))
    write(msgspec.to_builtins(result), json_file)


def _run(plan: _Plan, router: Path | None, console: Console) -> dict[str, Any]:
    """Measure the systems in turn, several times, and return the figures of each."""
    folder = models.resolve(plan.model, weights=False)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ares-relay-")))
        mocks = {role: stack.enter_context(_mock(role, folder, plan.model, logs)) for role in ("prefill", "decode")}
        ports = {role: mock.port for role, mock in mocks.items()}
        systems = [stack.enter_context(_gateway(ports, plan.model, logs))]
        if plan.parsers is not None:
            systems.append(stack.enter_context(_gateway(ports, plan.model, logs, plan.parsers)))
        if router is not None:
            systems += [stack.enter_context(_router(router, ports, mode, logs)) for mode in ("prefill-decode", "plain")]
        for system in systems:  # a warm-up run of everything
            uvloop.run(_read_streams(system, plan.model, plan.streams, 50))
        direct = mocks["decode"]
        for n in range(plan.repeats):
            console.print(f"repeat {n + 1} of {plan.repeats}", style="dim")
            for mode, tokens in plan.tokens.items():
                _pace(direct, plan.interval_ms / 1000 if mode == "paced" else 0.0)
                for system in systems:
                    _measure(system, mode, plan.model, plan.streams, tokens)
            _pace(direct, 0.0)
            for _ in range(plan.first_tokens):
                for system in (direct, *systems):
                    (reply,) = uvloop.run(_read_streams(system, plan.model, 1, _FIRST_TOKENS))
                    system.first_token_s.append(_first_token_s(reply))
        return {system.name: _figures(system, direct) for system in systems}


def _measure(system: _System, mode: str, model: str, streams: int, tokens: int) -> None:
    before = system.cpu()
    replies = uvloop.run(_read_streams(system, model, streams, tokens))
    spent = system.cpu() - before
    system.cpu_s[mode].append(spent / (streams * tokens) * 100_000)
    events = streams * (tokens + _OTHER_EVENTS)
    system.chunks_per_read[mode].append(events / sum(len(reply.data) for reply in replies))
    system.observe_memory()


_TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
# The event with the role, and `[DONE]`.
_OTHER_EVENTS = 2


async def _read_streams(system: _System, model: str, streams: int, tokens: int) -> list[sse.RawReply]:
    """Read chat streams concurrently, and check that every token arrived.

    Raises
    ------
    sse.StreamError
        A stream broke, or its events are not one a token, one for the role and `[DONE]`.
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
    replies = await sse.read_at_once([request] * streams, [system.port], _GRACE_S + tokens)
    for reply in replies:
        if not reply.complete:
            begin = b"".join(reply.data)[:500]
            raise sse.StreamError(f"the stream broke ({reply.finished.result()!r}); it began with {begin!r}")
        events = sum(count for _, count in reply.events_of_reads())
        if events != tokens + _OTHER_EVENTS:
            raise sse.StreamError(f"{events} events arrived instead of {tokens + _OTHER_EVENTS}")
    return replies


def _first_token_s(reply: sse.RawReply) -> float:
    """Return the seconds from the request to the read with the second event: the first holds the role alone."""
    events = 0
    for moment, count in reply.events_of_reads():
        events += count
        if events > 1:
            return moment - reply.started
    raise sse.StreamError("the stream has no token")


# --- processes ---


@contextlib.contextmanager
def _mock(role: str, folder: Path, model: str, logs: Path) -> Iterator[_System]:
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "ares.mock_engine.free_running", "--role", role, "--port", str(port)]
    command += ["--folder", str(folder), "--model", model]
    yield from _served(f"mock {role}", command, port, logs, "/version", ["mock"])


@contextlib.contextmanager
def _gateway(ports: dict[str, int], model: str, logs: Path, parsers: str | None = None) -> Iterator[_System]:
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "ares", "gateway", "--model", model, "--port", str(port)]
    for mock in ports.values():
        command += ["--worker", f"http://127.0.0.1:{mock}"]
    command += shlex.split(parsers or "")
    name = "ares" if parsers is None else "ares with parsers"
    for system in _served(name, command, port, logs, "/version", [f"mock-{role}" for role in ports]):
        system.parses = parsers is not None
        yield system


@contextlib.contextmanager
def _router(router: Path, ports: dict[str, int], mode: str, logs: Path) -> Iterator[_System]:
    port = free_port("127.0.0.1")
    command = [str(router), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port("127.0.0.1"))]
    command += ["--policy", "round_robin", "--log-level", "warning", "--worker-startup-check-interval", "1"]
    prefill, decode = (f"http://127.0.0.1:{ports[role]}" for role in ("prefill", "decode"))
    if mode == "plain":
        command += ["--worker-urls", decode]
    else:
        command += ["--vllm-pd-disaggregation", "--prefill", prefill, "--decode", decode]
    yield from _served(f"vllm-router {mode}", command, port, logs, "/health", [])


def _served(name: str, command: list[str], port: int, logs: Path, route: str, expected: list[str]) -> Iterator[_System]:
    """Run a server, and yield it once the answer of `route` contains all of `expected`."""
    log = logs / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603 - our own command
            # A separate process group, so that Ctrl-C reaches only us and one signal reaches all that it started.
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            process_group=0,
        )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError):
                answer = _get(port, route)
                if all(text in answer for text in expected):
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{name} does not serve; the end of its log:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        import psutil

        yield _System(name, port, psutil.Process(process.pid))
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def _get(port: int, route: str, body: bytes | None = None) -> str:
    with open_direct(f"http://127.0.0.1:{port}{route}", 5, body) as reply:
        return str(reply.read().decode())


def _pace(mock: _System, interval_s: float) -> None:
    _get(mock.port, "/simulate/pace", msgspec.json.encode({"interval_s": interval_s}))


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


def _versions(router: Path | None) -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("httptools", "msgspec", "tokenizers", "uvloop")}
    if router is not None:
        # The router has its own environment.
        ask = "from importlib.metadata import version; print(version('vllm-router'))"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(  # noqa: S603 - the operator's own
                [router.parent / "python", "-c", ask], capture_output=True, text=True, timeout=30, check=True
            )
            versions["vllm-router"] = found.stdout.strip()
    return versions


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
