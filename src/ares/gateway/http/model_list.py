"""`/v1/models`: the served models under each of their names, and their LoRA adapters."""

from typing import Any

from fastapi import APIRouter, Request

from ares.gateway.http.schema import errors
from ares.gateway.models import Models
from ares.gateway.service import unknown_model

router = APIRouter(prefix="/v1/models")


@router.get("")
async def models(request: Request) -> dict[str, Any]:
    """List the served models, each under each of its names, and their LoRA adapters."""
    return {"object": "list", "data": list(_entries(request.app.state.models).values())}


@router.get("/{name:path}", responses=errors(401, 404))
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describe a served model or an adapter."""
    known = _entries(request.app.state.models)
    # The name of a folder begins with a slash, which a path keeps only where it is percent-encoded.
    full = f"/{name}" if name not in known and f"/{name}" in known else name
    if full not in known:
        raise unknown_model(full)
    return known[full]


def _entries(models: Models) -> dict[str, dict[str, Any]]:
    """Return what a request may name as `model`, by name; a name leads to the first that has it (`Models.of`)."""
    known: dict[str, dict[str, Any]] = {}
    for gateway in models:
        known |= {name: _entry(name, gateway.maximum_model_tokens) for name in gateway.names}
    for gateway in models:
        for name in gateway.pool.adapters:
            known.setdefault(name, _entry(name, gateway.maximum_model_tokens) | {"parent": gateway.names[0]})
    return known


def _entry(name: str, maximum_tokens: int | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ares", "max_model_len": maximum_tokens}
