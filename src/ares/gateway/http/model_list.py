"""`/v1/models`: the served model under each of its names, and its LoRA adapters."""

from typing import Any

from fastapi import APIRouter, Request

from ares.gateway.http.schema import errors
from ares.gateway.service import Gateway

router = APIRouter(prefix="/v1/models")


@router.get("")
async def models(request: Request) -> dict[str, Any]:
    """List the one served model, under each of its names, and its LoRA adapters."""
    return {"object": "list", "data": list(_entries(request.app.state.gateway).values())}


@router.get("/{name:path}", responses=errors(401, 404))
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describe the served model or one of its adapters."""
    gateway: Gateway = request.app.state.gateway
    known = _entries(gateway)
    # The name of a folder begins with a slash, which a path keeps only where it is percent-encoded.
    full = f"/{name}" if name not in known and f"/{name}" in known else name
    gateway.adapter(full)  # raises where nothing is served under the name
    return known[full]


def _entries(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """Return what a request may name as `model`, by name."""
    entry = {"object": "model", "created": 0, "owned_by": "ares", "max_model_len": gateway.maximum_model_tokens}
    known: dict[str, dict[str, Any]] = {name: {"id": name, **entry} for name in gateway.names}
    for name in gateway.pool.adapters:
        known.setdefault(name, {"id": name, **entry, "parent": gateway.names[0]})
    return known
