"""Telemetry faults of real engines: in the gateway's process, messages of an instance are changed on command.

The faults are those of mock engines (mock_engine/faults.py). Messages are changed before they are checked, so that
impossible values meet the same checks. Predictions are replaced whether the engine makes any or not.
"""

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.mock_engine.faults import PREDICTIONS, FaultState, faulty_telemetry
from ares.protocol import messages, rpc
from ares.protocol.fields import FAULTS_ROUTE


class TelemetryFaultInjector:
    """The faults of each instance, by its name, and the messages as they change them."""

    def __init__(self) -> None:
        self._faults: dict[str, FaultState] = {}
        self._newest: dict[str, messages.Telemetry] = {}

    def change(self, name: str, body: bytes) -> None:
        """Take the fields of a JSON body (`Faults`); msgspec.DecodeError where they are wrong."""
        self._faults.setdefault(name, FaultState()).change(body)

    def altered(self, name: str, kv_blocks: int, message: bytes) -> bytes | None:
        """Return the message as its faults change it; None where the gateway gets none."""
        faults = self._faults[name].current if name in self._faults else None
        if faults is None or (faults.telemetry is None and faults.predictions is None):
            self._newest.pop(name, None)
            return message
        load = rpc.decode_event(message)
        if not isinstance(load, messages.Telemetry):
            return message
        if faults.predictions is not None:
            wrong = PREDICTIONS[faults.predictions]
            rows = [msgspec.structs.replace(row, remaining=wrong) if row.output else row for row in load.rows]
            load = msgspec.structs.replace(load, rows=rows)
        changed = faulty_telemetry(faults.telemetry, load, self._newest.setdefault(name, load), kv_blocks)
        return rpc.encode(changed) if changed is not None else None


def install(injector: TelemetryFaultInjector, pool: Pool) -> None:
    """Change the messages that come from the instances of a pool, from now on."""

    def altered(instance: Instance, body: bytes) -> bytes | None:
        hello = instance.state.hello
        return injector.altered(instance.name, hello.kv_blocks if hello is not None else 0, body)

    for instance in pool.instances:
        instance.intercept = altered


def add_route(app: FastAPI, injector: TelemetryFaultInjector) -> None:
    """Add the route of mock engines that takes faults, with the name of the instance."""

    @app.post(f"{FAULTS_ROUTE}/{{name}}")
    async def change(name: str, request: Request) -> JSONResponse:
        try:
            injector.change(name, await request.body())
        except msgspec.DecodeError as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({})
