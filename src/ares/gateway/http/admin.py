"""The operator's routes: status, moves, drains, preset."""

import asyncio
import ipaddress
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from ares.gateway.control.controller import prepare
from ares.gateway.control.predictions import plausible, predicted_peak, predicted_remaining, rows_by_key
from ares.gateway.http.access import bearer, foreign_origin, matches, unknown_key
from ares.gateway.http.request_ids import resolve
from ares.gateway.http.schema import errors
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import why_closed
from ares.gateway.service import COMMANDED, Gateway, TargetError
from ares.gateway.session.handover import NotMovableError
from ares.gateway.session.precopy import AUTO, WantedMode
from ares.gateway.session.session import Session
from ares.names import matching
from ares.protocol import messages

# At most so many ids are named in an error.
_MAXIMUM_IDS_NAMED = 8


class AdminError(Exception):
    """The command cannot be carried out; `status` is the HTTP status of the reply."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class MigrationRequest(BaseModel):
    """`POST /admin/v1/migrations`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    request_id: str = Field(min_length=1)
    """Id of a running request, as `GET /admin/v1/status` or a reply shows it, or a short form with two dots."""
    target: str = Field(min_length=1)
    """Name of the decode instance to move it to."""
    mode: WantedMode = AUTO
    """How its KV gets there (docs/migration.md)."""


class DrainRequest(BaseModel):
    """`POST /admin/v1/instances/{name}/drain`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    deadline_s: float = Field(default=60.0, ge=0, le=86400)
    """After this long, requests that are left are aborted there and resume elsewhere from their tokens."""
    force: bool = False
    """Whether to drain the last open instance of its kind too."""


class PresetRequest(BaseModel):
    """`PUT /admin/v1/preset`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    preset: str = Field(min_length=1)
    """Name of the preset to decide by from now on."""


async def allowed(request: Request) -> None:
    """Accept requests with the key; without a configured key, requests of this machine that no foreign page sent."""
    gateway: Gateway = request.app.state.gateway
    key = gateway.config.admin_key
    if key is not None:
        given = bearer(request.headers)
        if not matches(given, key):
            message = unknown_key(request.headers, given, "the admin routes need their key")
            raise AdminError(401, message, "invalid_api_key")
        return
    host = request.client.host if request.client else ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise AdminError(403, "without a configured admin key, the admin routes answer to loopback only")
    if (why := foreign_origin(request.headers)) is not None:
        raise AdminError(403, f"without a configured admin key, the admin routes answer to this machine only: {why}")


router = APIRouter(prefix="/admin/v1", dependencies=[Depends(allowed)], responses=errors(401, 403))


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Return instances, running requests and recent moves, the newest last; learners, and connectors' resources."""
    gateway: Gateway = request.app.state.gateway
    return snapshot(gateway) | {
        "migrations": [asdict(record) for record in gateway.migrations],
        "learners": gateway.learners.as_json(),
        "process": {"tasks": len(asyncio.all_tasks())},
        "connectors": {i.name: i.state.telemetry.resources for i in gateway.pool.instances if i.state.telemetry},
    }


def snapshot(gateway: Gateway) -> dict[str, Any]:
    """Return instances, running requests, and recent measurements."""
    rows, differing = rows_by_key(gateway.pool.instances), gateway.pool.differing()
    sessions = Counter(id(s.instance) for s in gateway.sessions.values())
    return {
        "now": time.time(),
        "preset": gateway.controller.preset,
        "settings": gateway.controller.in_force,
        "gateway": gateway.name,
        "controller": gateway.controller.lease_status,
        "suspensions": gateway.controller.suspensions,
        "waiting": gateway.controller.waiting,
        "backlog": len(gateway.backlog),
        "backlog_tokens": gateway.backlog.tokens,
        "suspended": gateway.controller.suspended,
        "instances": [
            _instance(i, sessions[id(i)], gateway.drainer.left(i) if i.state.draining else None)
            | {"differs_in": differing.get(i.name)}
            for i in gateway.pool.instances
        ],
        "requests": [_request(s, rows.get(s.key or "")) for s in list(gateway.sessions.values())],
        "recent": gateway.recent.summary(),
        "learner_ages_s": gateway.learners.ages(),
        "learner_old_s": gateway.tuning.learner_old_s,
    }


@router.post("/migrations", responses=errors(400, 404, 409, 503))
async def migrate(body: MigrationRequest, request: Request) -> dict[str, Any]:
    """Move a running request; answers when it runs at its target, or with the reason why it does not."""
    gateway: Gateway = request.app.state.gateway
    session = _find_session(gateway, body.request_id)
    target = _find(gateway, body.target)
    try:
        record = await gateway.migrate(session, target, COMMANDED, COMMANDED, body.mode)
    except NotMovableError as refusal:
        raise AdminError(409, str(refusal), refusal.reason) from refusal
    except TargetError as refusal:
        raise AdminError(refusal.status, str(refusal), "target_unavailable") from refusal
    return asdict(record)


@router.post("/instances/{name:path}/drain", responses=errors(400, 404, 409))
async def drain(name: str, request: Request, body: DrainRequest | None = None) -> dict[str, Any]:
    """Close an instance and move out what can be moved; answers at once, the status shows how many are left."""
    gateway: Gateway = request.app.state.gateway
    instance, body = _find(gateway, name), body or DrainRequest()
    if not body.force and (why := gateway.pool.lost_without(instance)) is not None:
        message = f'{name} is {why}; drain it nevertheless with --force (in the API, "force": true)'
        raise AdminError(409, message, "last_instance")
    deadline_s = body.deadline_s
    await gateway.drainer.drain(instance, deadline_s)
    return {"name": instance.name, "draining": True, "left": gateway.drainer.left(instance), "deadline_s": deadline_s}


@router.post("/instances/{name:path}/undrain", responses=errors(404, 409))
async def undrain(name: str, request: Request) -> dict[str, Any]:
    """Put a drained instance back into service."""
    gateway: Gateway = request.app.state.gateway
    instance = _find(gateway, name)
    await gateway.drainer.undrain(instance)
    return {"name": instance.name, "draining": False}


@router.put("/preset", responses=errors(400))
async def switch(body: PresetRequest, request: Request) -> dict[str, Any]:
    """Switch the policies, also for requests that wait already."""
    gateway: Gateway = request.app.state.gateway
    try:
        # It may have to be compiled, which must not stop the streams.
        await asyncio.to_thread(prepare, gateway.controller.find_preset(body.preset))
        gateway.controller.use_preset(body.preset)
    except ValueError as error:
        raise AdminError(400, str(error), "unknown_preset") from error
    return {"preset": gateway.controller.preset}


def _find_session(gateway: Gateway, given: str) -> Session:
    ids = resolve(given, gateway.sessions)
    if not ids:
        raise AdminError(404, f"no running request {given!r}", "request_not_found")
    if len(ids) > 1:
        shown = ", ".join(ids[:_MAXIMUM_IDS_NAMED]) + (", ..." if len(ids) > _MAXIMUM_IDS_NAMED else "")
        raise AdminError(409, f"{given!r} may be any of {len(ids)} requests: {shown}", "request_ambiguous")
    return gateway.sessions[ids[0]]


def _find(gateway: Gateway, given: str) -> Instance:
    names = [instance.name for instance in gateway.pool.instances]
    found = matching(given, names)
    if len(found) > 1:
        raise AdminError(409, f"{given!r} may be any of {', '.join(found)}", "instance_ambiguous")
    instance = gateway.pool.find(found[0]) if found else None
    if instance is None:
        raise AdminError(404, f"no instance {given!r}; instances: {', '.join(names)}", "instance_not_found")
    return instance


def _instance(instance: Instance, sessions: int, left: int | None) -> dict[str, Any]:
    load, hello = instance.state.telemetry, instance.state.hello
    row: dict[str, Any] = {
        "name": instance.name,
        "role": instance.role,
        "url": instance.url,
        "healthy": instance.health.healthy,
        "draining": instance.state.draining,
        "why": why_closed(instance),
        "left": left,
    }
    if load is not None and hello is not None:
        row |= {
            "running": load.running,
            "waiting": load.waiting,
            "resident_tokens": sum(r.resident for r in load.rows),
            "predicted_remaining_tokens": predicted_remaining(load),
            "predicted_peak_tokens": predicted_peak(load, instance.state.layout),
            "capacity_tokens": instance.state.capacity_tokens,
            "kv_blocks_used": load.kv_blocks_used,
            "kv_blocks": hello.kv_blocks,
            "pinned": load.pinned,
            "step_time_s": load.step_time_s,
            "steps": load.steps,
            "busy_s": load.busy_s,
            "block_size": hello.block_size,
            "max_num_seqs": hello.max_num_seqs,
            "max_num_batched_tokens": hello.max_num_batched_tokens,
            "step_time_coefficients": None
            if (fitted := instance.state.step_time.coefficients) is None
            else fitted.tolist(),
            "preemptions": load.preemptions,
            "sessions": sessions,
            "predictor": load.predictor,
            "predictor_refused": None
            if not load.predictor_refused[0]
            else dict(zip(("version", "why"), load.predictor_refused, strict=True)),
        }
    return row


def _request(session: Session, row: messages.Row | None) -> dict[str, Any]:
    why = session.unmovable_now()
    predicted = row.remaining if row is not None else None
    usable = predicted is not None and plausible(predicted)
    low, middle, high = predicted if predicted is not None and usable else (None, None, None)
    return {
        "id": session.id,
        "state": "moving" if session.moving else session.phase,
        "instance": session.instance.name if session.instance else None,
        "resident_tokens": session.tokens,
        "prompt_tokens": len(session.prompt),
        "output_tokens": len(session.emitted),
        "remaining_p10": low,
        "remaining_p50": middle,
        "remaining_p90": high,
        "moves": session.moves,
        "movable": why is None,
        "reason": why,
    }
