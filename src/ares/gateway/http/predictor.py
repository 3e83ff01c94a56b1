"""`/admin/v1/predictor`: learners of the predictor report here, and operators read it."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from ares.gateway.http.admin import allowed
from ares.gateway.http.schema import errors
from ares.gateway.processes.siblings import LEARNERS_PROCESS, siblings_of
from ares.gateway.service import Gateway
from ares.protocol.learner_report import Report

router = APIRouter(prefix="/admin/v1", dependencies=[Depends(allowed)], responses=errors(401, 403))
PATH = "/admin/v1/predictor"


@router.put("/predictor", responses=errors(400, 413))
async def report(body: Report, request: Request) -> dict[str, Any]:
    """Take the state of a learner, in place of its last one; answers how many learners report here."""
    gateway: Gateway = request.app.state.gateway
    siblings = siblings_of(request)
    if siblings is not None and gateway.counts.process != LEARNERS_PROCESS:
        return await siblings.forward(LEARNERS_PROCESS, request)
    gateway.learners.take(body)
    return {"learners": len(gateway.learners.ages())}


@router.get("/predictor")
async def reports(request: Request) -> dict[str, Any]:
    """Return the newest report of each learner with its age, the newest first; `old`: it does not report any more."""
    gateway: Gateway = request.app.state.gateway
    siblings = siblings_of(request)
    if siblings is not None and gateway.counts.process != LEARNERS_PROCESS:
        return await siblings.forward(LEARNERS_PROCESS, request)
    return {"learners": gateway.learners.as_json()}
