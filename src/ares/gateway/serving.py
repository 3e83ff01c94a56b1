"""`ares gateway`: the application on a server, in one process or several."""

import contextlib
import gc
import logging
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from ares import addresses, logs
from ares.addresses import AddressError
from ares.config import GatewayConfig, live_preset
from ares.gateway.control.controller import prepare
from ares.gateway.http.app import build
from ares.gateway.http.connection import Connection, Limits
from ares.gateway.http.responses import DirectSend
from ares.gateway.http.round_of_writes import RoundOfWrites
from ares.gateway.http.server import Server
from ares.gateway.models import ServedModel
from ares.gateway.openai.parsing import Parsers
from ares.gateway.processes.acceptor import listen
from ares.gateway.processes.child import ChildServer
from ares.gateway.processes.parent import Parent
from ares.gateway.processes.shared_counts import SharedCounts, preset_names
from ares.gateway.processes.siblings import Siblings
from ares.gateway.tracing import settings as tracing
from ares.models import resolve as models
from ares.policy import PRESETS

logger = logging.getLogger(__name__)

LoadParsers = Callable[[GatewayConfig, Path], Parsers | None]

# For slow clients to read the ends of their streams.
_FLUSH_S = 5
# New objects after which garbage collection looks at them, ten times as many before it looks at all. With Python's own
# 700, it was a fifth of the CPU of a thousand requests that come at once: each of them has some 300 objects.
_COLLECT_AFTER = 10_000


def serve(config: GatewayConfig, load_parsers: LoadParsers) -> None:
    """Run a gateway until a signal stops it; AddressError where it cannot listen."""
    process = " %(processName)s" if config.processes > 1 else ""
    text = f"%(asctime)s{process} %(levelname)s %(name)s: %(message)s"
    logs.configure(config.log_format, config.log_level, text)
    # Before the model, which may have to be fetched.
    addresses.check(config.host, {"--port": [config.port]})
    if (warning := config.exposure()) is not None:
        logger.warning(warning)
    tracing.check(config.otlp_traces_endpoint)
    served = [_load(one, load_parsers) for one in config.of_models()]
    if config.processes > 1:
        _serve_in_processes(config, served)
        return
    app = _build(served)
    server = Server(server_config(config, app), app)
    _freeze()
    server.run()


def _load(config: GatewayConfig, load_parsers: LoadParsers) -> ServedModel:
    folder = models.resolve(config.model, weights=False)
    return ServedModel(config, folder, load_parsers(config, folder))


def _build(served: list[ServedModel], siblings: Siblings | None = None) -> FastAPI:
    first, *further = served
    return build(first.config, first.folder, parsers=first.parsers, siblings=siblings, further=further)


def _serve_in_processes(config: GatewayConfig, served: list[ServedModel]) -> None:
    counts = SharedCounts(config.processes, len(config.api_keys), preset_names(config.preset, PRESETS))
    listeners = listen(config.host, config.port)
    with _ended_by_sigterm(), _private_folder() as private:
        siblings = Siblings(Path(private), counts)
        siblings.check()
        app = _build(served, siblings)
        uvicorn_config = server_config(config, app)
        uvicorn_config.load()
        # In the parent, so that the compiled policies and what they need are in memory once.
        prepare(live_preset(config.preset, config.settings))

        def serve_in_child(link: socket.socket) -> None:
            ChildServer(uvicorn_config, app, siblings, link).run()

        scheme = "https" if config.tls_certificate is not None else "http"
        for listener in listeners:
            host, port = listener.getsockname()[:2]
            where = addresses.with_port(host, port)
            logger.info("%d processes serve %s://%s (Ctrl-C ends them)", config.processes, scheme, where)
        _freeze()
        status = Parent(listeners, counts, serve_in_child).run()
    if status < 0:  # as uvicorn does it
        signal.raise_signal(-status)
    if status:
        raise SystemExit(status)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a start as an error does, so that what was made is removed."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _private_folder() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder for the sockets between the processes; AddressError where none can be made."""
    try:
        return tempfile.TemporaryDirectory(prefix="ares-gateway-")
    except OSError as error:
        raise AddressError(f"no folder for the sockets between the processes: {error}; set TMPDIR") from None


def server_config(config: GatewayConfig, app: FastAPI) -> uvicorn.Config:
    """Return how uvicorn serves the application."""
    return uvicorn.Config(
        DirectSend(app),
        host=config.host,
        port=config.port,
        loop="uvloop",
        http=partial(  # type: ignore[arg-type] # uvicorn only calls it
            Connection,
            Limits(config.max_head_bytes, config.idle_timeout_s, config.unread_timeout_s),
            app.state.gateway.metrics.refuse,
            writes=RoundOfWrites(),
        ),
        ws="none",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=_FLUSH_S,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )


def _freeze() -> None:
    """Keep the objects loaded by now out of garbage collection.

    Searching them again and again would be a good part of a token's cost, and would copy what processes share. What
    requests make is searched less often than Python would: nearly all of it is freed without.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)
