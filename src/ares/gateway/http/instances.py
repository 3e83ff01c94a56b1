"""`/admin/v1/instances`: which instances there are, what names them, and by hand further ones or fewer."""

import re
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from ares.gateway.discovery.membership import NamedElsewhereError
from ares.gateway.http.admin import AdminError, allowed, find_instance
from ares.gateway.http.schema import errors
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import why_closed
from ares.gateway.processes.siblings import siblings_of
from ares.gateway.service import Gateway

router = APIRouter(prefix="/admin/v1", dependencies=[Depends(allowed)], responses=errors(401, 403))
# In the path of a request, slashes that follow each other are one (normalized.py).
_SCHEME = re.compile(r"(https?):/+", re.IGNORECASE)

Deadline = Annotated[
    float,
    Query(ge=0, le=86400, description="Seconds that its requests have to end or to move; then they resume elsewhere."),
]
Force = Annotated[bool, Query(description="Whether to remove the last open instance of its kind too.")]


class NewInstance(BaseModel):
    """`POST /admin/v1/instances`. Name, role and model are what the instance says of itself."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str = Field(min_length=1, max_length=2048)
    """Base URL of the instance."""


@router.get("/instances")
async def instances(request: Request) -> dict[str, Any]:
    """Return all instances with what names them, the sources with what is wrong, and the newest changes."""
    gateway: Gateway = request.app.state.gateway
    problems = gateway.membership.problems
    return {
        "instances": [described(gateway, i) for i in gateway.pool.instances],
        "sources": [{"name": name, "problem": problems.get(name)} for name in gateway.config.service_discovery],
        "changes": [asdict(change) for change in gateway.pool.changes.since(0)],
    }


@router.post("/instances", responses=errors(400, 413))
async def add(body: NewInstance, request: Request) -> dict[str, Any]:
    """Add an instance, until it is removed or the gateway ends; `new` is whether nothing named it before."""
    gateway: Gateway = request.app.state.gateway
    new = await add_instance(request, body.url)
    return described(gateway, instance_at(gateway, body.url.strip())) | {"new": new}


@router.delete("/instances/{name:path}", responses=errors(400, 404, 409))
async def remove(name: str, request: Request, deadline_s: Deadline = 60.0, force: Force = False) -> dict[str, Any]:
    """Remove an instance, by its name or its URL: it takes no new requests, those that it has end or move."""
    gateway: Gateway = request.app.state.gateway
    return described(gateway, await remove_instance(request, name, deadline_s, force=force))


async def add_instance(request: Request, url: str) -> bool:
    """Add an instance at every process of the gateway; return whether nothing named it before.

    AdminError says what is wrong with the URL.
    """
    gateway: Gateway = request.app.state.gateway
    try:
        new = gateway.membership.add(url)
    except ValueError as error:
        raise AdminError(400, str(error)) from error
    await _tell_others(request)
    return new


async def remove_instance(request: Request, given: str, deadline_s: float, *, force: bool) -> Instance:
    """Remove an instance by its name or URL at every process, and return it; AdminError says why it cannot be."""
    gateway: Gateway = request.app.state.gateway
    instance = instance_at(gateway, given) if _SCHEME.match(given) else find_instance(gateway, given)
    if not force and (why := gateway.pool.lost_without(instance)) is not None:
        raise AdminError(409, f"{instance.name} is {why}; remove it nevertheless with ?force=true", "last_instance")
    try:
        gateway.membership.remove(instance.url, deadline_s)
    except NamedElsewhereError as error:
        raise AdminError(409, str(error)) from error
    await _tell_others(request)
    return instance


async def _tell_others(request: Request) -> None:
    if (siblings := siblings_of(request)) is not None:
        await siblings.tell_others(request)


def instance_at(gateway: Gateway, url: str) -> Instance:
    """Return what is watched at a URL, whose slashes may be single ones; AdminError where nothing is."""
    try:
        instance = gateway.pool.at(_SCHEME.sub(r"\1://", url, count=1))
    except ValueError:  # no URL at all
        instance = None
    if instance is None:
        raise AdminError(404, f"no instance at {url!r}; GET /admin/v1/instances shows them", "instance_not_found")
    return instance


def described(gateway: Gateway, instance: Instance) -> dict[str, Any]:
    """Return who an instance is, how it is, and what names it."""
    described = instance.description
    return {
        "name": instance.name,
        "url": instance.url,
        "role": instance.role if described is not None else None,
        "models": described.models if described is not None else [],
        "boot": described.boot if described is not None else None,
        "open": instance.open,
        "leaving": instance.leaving,
        "why": why_closed(instance),
        "named_by": gateway.membership.named_by(instance.url),
    }
