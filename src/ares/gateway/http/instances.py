"""`/admin/v1/instances`: which instances there are, what names them, and by hand further ones or fewer."""

import re
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from ares.gateway.discovery.membership import NamedElsewhereError
from ares.gateway.http.admin import AdminError, allowed, find_instance
from ares.gateway.http.schema import errors
from ares.gateway.models import Models
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
    models: Models = request.app.state.models
    first = models.first
    problems = first.membership.problems
    return {
        "instances": [described(models, i) for i in models.instances],
        "sources": [{"name": name, "problem": problems.get(name)} for name in first.config.service_discovery],
        "changes": [asdict(change) for change in first.pool.changes.since(0)],
    }


@router.post("/instances", responses=errors(400, 413))
async def add(body: NewInstance, request: Request) -> dict[str, Any]:
    """Add an instance, until it is removed or the gateway ends; `new` is whether nothing named it before."""
    models: Models = request.app.state.models
    new = await add_instance(request, body.url)
    return described(models, instance_at(models, body.url.strip())) | {"new": new}


@router.delete("/instances/{name:path}", responses=errors(400, 404, 409))
async def remove(name: str, request: Request, deadline_s: Deadline = 60.0, force: Force = False) -> dict[str, Any]:
    """Remove an instance, by its name or its URL: it takes no new requests, those that it has end or move."""
    models: Models = request.app.state.models
    return described(models, await remove_instance(request, name, deadline_s, force=force))


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
    models: Models = request.app.state.models
    instance = instance_at(models, given) if _SCHEME.match(given) else find_instance(models, given)
    gateway = models.of_instance(instance)
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


def instance_at(models: Models, url: str) -> Instance:
    """Return what is watched at a URL, whose slashes may be single ones; AdminError where nothing is."""
    try:
        instance = models.at(_SCHEME.sub(r"\1://", url, count=1))
    except ValueError:  # no URL at all
        instance = None
    if instance is None:
        raise AdminError(404, f"no instance at {url!r}; GET /admin/v1/instances shows them", "instance_not_found")
    return instance


def described(models: Models, instance: Instance) -> dict[str, Any]:
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
        "named_by": models.first.membership.named_by(instance.url),
    }
