"""Telemetry that lies about real engines: in the gateway's process, what comes from an instance is changed.

The lies are those of simulated engines (mock_engine/faults.py). Messages are changed before they are checked, so
that what no instance can be meets the same checks. Predictions are lied about whether the engine makes any or not.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from ares.gateway.pool.instance import Instance
from ares.mock_engine.faults import PREDICTIONS, FaultState, faulty_telemetry
from ares.protocol import messages


class TelemetryFaultInjector:
    """Knows the lies about each instance, by its name."""

    def __init__(self) -> None:
        self._faults: dict[str, FaultState] = {}
        self._newest: dict[str, messages.Telemetry] = {}

    def change(self, name: str, body: bytes) -> None:
        """Take the fields of a JSON body (`Faults`); msgspec.DecodeError where they are wrong."""
        self._faults.setdefault(name, FaultState()).change(body)

    def told(self, name: str, kv_blocks: int, message: bytes) -> bytes | None:
        """Return what the gateway is told instead of a message; None for nothing."""
        faults = self._faults[name].current if name in self._faults else None
        if faults is None or (faults.telemetry is None and faults.predictions is None):
            self._newest.pop(name, None)
            return message
        load = messages.decode_event(message)
        if not isinstance(load, messages.Telemetry):
            return message
        if faults.predictions is not None:
            wrong = PREDICTIONS[faults.predictions]
            rows = [msgspec.structs.replace(row, remaining=wrong) if row.output else row for row in load.rows]
            load = msgspec.structs.replace(load, rows=rows)
        told = faulty_telemetry(faults.telemetry, load, self._newest.setdefault(name, load), kv_blocks)
        return messages.encode(told) if told is not None else None


def install(liar: TelemetryFaultInjector) -> None:
    """Let the instances that a gateway hears be lied about, from now on and in this process."""
    receive = Instance._receive  # noqa: SLF001 - where every message of an instance comes in

    async def deceived(self: Instance, body: bytes, on_hello: Callable[[Instance], Coroutine[Any, Any, None]]) -> None:
        told = liar.told(self.name, self.hello.kv_blocks if self.hello is not None else 0, body)
        if told is not None:
            await receive(self, told, on_hello)

    Instance._receive = deceived  # type: ignore[method-assign] # noqa: SLF001 - likewise


def add_route(app: FastAPI, liar: TelemetryFaultInjector) -> None:
    """Take lies as simulated engines do, with the name of the instance."""

    @app.post("/simulate/faults/{name}")
    async def change(name: str, request: Request) -> JSONResponse:
        try:
            liar.change(name, await request.body())
        except msgspec.DecodeError as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({})
