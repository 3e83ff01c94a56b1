"""`/workers`: instances as users of vllm-router add, list and remove them; its replies are those of its version 0.1.17.

What that takes besides the URL has no effect here and is refused by name: an instance says itself which role and model
it has, and all have the key of the gateway's `worker_api_key`.
"""

from typing import Any

from fastapi import APIRouter, Depends, Request

from ares.gateway.http.admin import allowed
from ares.gateway.http.instances import Force, NewInstance, add_instance, instance_at, remove_instance
from ares.gateway.http.schema import errors
from ares.gateway.models import Models
from ares.gateway.pool.instance import Instance

router = APIRouter(dependencies=[Depends(allowed)], responses=errors(401, 403))
_TYPES = {"prefill": "prefill", "decode": "decode", "both": "regular"}


@router.post("/workers", responses=errors(400, 413))
async def add(body: NewInstance, request: Request) -> dict[str, Any]:
    """Add an instance; unlike vllm-router's, this does not wait for it: `GET /workers/{url}` shows when it is ready."""
    models: Models = request.app.state.models
    await add_instance(request, body.url)
    url = instance_at(models, body.url.strip()).url
    return {"success": True, "message": f"Successfully added worker: {url}"}


@router.get("/workers")
async def listed(request: Request) -> dict[str, Any]:
    """Return all instances, and how many there are of each type."""
    models: Models = request.app.state.models
    workers = [_worker(models, i) for i in models.instances]
    types = [worker["worker_type"] for worker in workers]
    stats = {f"{kind}_count": types.count(kind) for kind in _TYPES.values()}
    return {"workers": workers, "total": len(workers), "stats": stats}


@router.get("/workers/{url:path}", responses=errors(404))
async def one(url: str, request: Request) -> dict[str, Any]:
    """Return one instance."""
    models: Models = request.app.state.models
    return _worker(models, instance_at(models, url))


@router.delete("/workers/{url:path}", responses=errors(400, 404, 409))
async def remove(url: str, request: Request, force: Force = False) -> dict[str, Any]:
    """Remove an instance: it takes no new requests, those that it has end or move."""
    models: Models = request.app.state.models
    instance = await remove_instance(request, instance_at(models, url).url, models.first.tuning.leave_s, force=force)
    return {"success": True, "message": f"Worker {instance.url} is being removed"}


def _worker(models: Models, instance: Instance) -> dict[str, Any]:
    described, load = instance.description, instance.state.telemetry
    names = described.models if described is not None else []
    return {
        "url": instance.url,
        "model_id": names[0] if names else "unknown",
        "worker_type": _TYPES[instance.role] if described is not None else "unknown",
        "is_healthy": instance.open,
        "load": load.running + load.waiting if load is not None else 0,
        "connection_mode": "Http",
        "metadata": {"name": instance.name, "named_by": ", ".join(models.first.membership.named_by(instance.url))},
    }
