"""The operator's routes: status, moves, drains, preset."""

import asyncio
import ipaddress
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from ares.gateway.control.closing import ClosingError
from ares.gateway.control.controller import prepare
from ares.gateway.http.access import bearer, foreign_origin, matches, unknown_key
from ares.gateway.http.request_ids import resolve
from ares.gateway.http.schema import errors
from ares.gateway.http.status import role_of
from ares.gateway.models import Models
from ares.gateway.pool.instance import Instance
from ares.gateway.processes import together
from ares.gateway.processes.siblings import siblings_of
from ares.gateway.service import COMMANDED, Gateway, TargetError
from ares.gateway.session.handover import NotMovableError
from ares.gateway.session.precopy import AUTO, WantedMode
from ares.names import matching
from ares.protocol.messages import ROLES

T = TypeVar("T")

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
    """Whether to drain the last open instance of its kind too, and not to wait for other gateways that decide."""


class RoleRequest(BaseModel):
    """`POST /admin/v1/instances/{name}/role`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    role: str = Field(min_length=1, max_length=64)
    """The role to have: `prefill`, `decode` or `both`; the one that it has ends a change that is under way."""
    deadline_s: float = Field(default=60.0, ge=0, le=86400)
    """Where work that the role excludes is left after this long, the instance keeps its role."""


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
    return await together.status(request.app.state.models, siblings_of(request))


@router.post("/migrations", responses=errors(400, 404, 409, 503))
async def migrate(body: MigrationRequest, request: Request) -> dict[str, Any]:
    """Move a running request; answers when it runs at its target, or with the reason why it does not."""
    models: Models = request.app.state.models
    if (siblings := siblings_of(request)) is not None:
        _, process = _only_one(body.request_id, await together.running(models, siblings, body.request_id))
        if process != siblings.counts.process:
            return await siblings.forward(process, request)
    found = [(one, models.sessions[one]) for one in resolve(body.request_id, models.sessions)]
    _, session = _only_one(body.request_id, found)
    target = find_instance(models, body.target)
    try:
        record = await models.of_session(session).migrate(session, target, COMMANDED, COMMANDED, body.mode)
    except NotMovableError as refusal:
        raise AdminError(409, str(refusal), refusal.reason) from refusal
    except TargetError as refusal:
        raise AdminError(refusal.status, str(refusal), "target_unavailable") from refusal
    return asdict(record)


@router.post("/instances/{name:path}/drain", responses=errors(400, 404, 409, 503))
async def drain(name: str, request: Request, body: DrainRequest | None = None) -> dict[str, Any]:
    """Close an instance and move out what can be moved; answers at once, the status shows how many are left."""
    models: Models = request.app.state.models
    instance, body = find_instance(models, name), body or DrainRequest()
    gateway = models.of_instance(instance)
    deadline_s = body.deadline_s
    try:
        await (gateway.drainer.drain if body.force else gateway.drainer.order)(instance, deadline_s)
    except ClosingError as refusal:
        raise AdminError(refusal.status, str(refusal), refusal.code) from refusal
    # The instance tells the others, too, but a little later: once this has answered, it drains at every process.
    await _tell_others(request, DrainRequest(deadline_s=deadline_s, force=True))
    return {"name": instance.name, "draining": True, "left": gateway.drainer.left(instance), "deadline_s": deadline_s}


@router.post("/instances/{name:path}/undrain", responses=errors(404, 409))
async def undrain(name: str, request: Request) -> dict[str, Any]:
    """Put a drained instance back into service."""
    models: Models = request.app.state.models
    instance = find_instance(models, name)
    await models.of_instance(instance).drainer.undrain(instance)
    await _tell_others(request)
    return {"name": instance.name, "draining": False}


@router.post("/instances/{name:path}/role", responses=errors(400, 404, 409, 503))
async def role(name: str, request: Request, body: RoleRequest) -> dict[str, Any]:
    """Change the role of an instance while it runs; answers at once, the status shows when it has it."""
    models: Models = request.app.state.models
    instance = find_instance(models, name)
    gateway = models.of_instance(instance)
    wanted = next((known for known in ROLES if known == body.role), None)
    if wanted is None:
        raise AdminError(400, f"unknown role {body.role!r}: {', '.join(ROLES)}", "unknown_role")
    try:
        await gateway.roles.order(instance, wanted, body.deadline_s, "commanded")
    except ClosingError as refusal:
        raise AdminError(refusal.status, str(refusal), refusal.code) from refusal
    left = gateway.drainer.left(instance)
    return {"name": instance.name} | role_of(instance) | {"left": left, "deadline_s": body.deadline_s}


@router.put("/preset", responses=errors(400))
async def switch(body: PresetRequest, request: Request) -> dict[str, Any]:
    """Switch the policies, also for requests that wait already."""
    models: Models = request.app.state.models
    gateway, chosen = models.first, body.preset
    try:
        # It may have to be compiled, which must not stop the streams.
        await asyncio.to_thread(prepare, gateway.controller.find_preset(chosen))
        if siblings_of(request) is not None:
            gateway.counts.preset = chosen
        elif gateway.counts.processes > 1:
            chosen = gateway.counts.preset  # of several commands at the same time all processes take the last
        for one in models:
            one.controller.use_preset(chosen)
    except ValueError as error:
        raise AdminError(400, str(error), "unknown_preset") from error
    await _tell_others(request)
    return {"preset": gateway.controller.preset}


async def _tell_others(request: Request, body: BaseModel | None = None) -> None:
    """Send a command to the other processes.

    One that does not take it gets it elsewhere: from the instance that drains, or, of a preset, when it has started.
    """
    if (siblings := siblings_of(request)) is not None:
        await siblings.tell_others(request, body.model_dump_json().encode() if body is not None else None)


def _only_one(given: str, found: Sequence[tuple[str, T]]) -> tuple[str, T]:
    """Return the one request that `given` may be; AdminError where it may be none or several."""
    if not found:
        raise AdminError(404, f"no running request {given!r}", "request_not_found")
    if len(found) > 1:
        ids = [one for one, _ in found]
        shown = ", ".join(ids[:_MAXIMUM_IDS_NAMED]) + (", ..." if len(ids) > _MAXIMUM_IDS_NAMED else "")
        raise AdminError(409, f"{given!r} may be any of {len(ids)} requests: {shown}", "request_ambiguous")
    return found[0]


def find_instance(models: Models, given: str) -> Instance:
    """Return the instance of a name, or of a short form of it; AdminError where that is none, or several."""
    names = [instance.name for instance in models.instances]
    found = matching(given, names)
    if len(found) > 1:
        raise AdminError(409, f"{given!r} may be any of {', '.join(found)}", "instance_ambiguous")
    instance = next((one for one in models.instances if one.name in found), None)
    if instance is None:
        raise AdminError(404, f"no instance {given!r}; instances: {', '.join(names)}", "instance_not_found")
    return instance
