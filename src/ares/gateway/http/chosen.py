"""Which gateway answers a request: that of the model that it names."""

from fastapi import Request

from ares.gateway.models import Models
from ares.gateway.service import Gateway


def gateway_for(request: Request, model: str | None) -> Gateway:
    """Return the gateway of the model that a request names; BadRequestError where there is none."""
    models: Models = request.app.state.models
    found = request.state.gateway = models.of(model)
    return found


def retry_after_s(request: Request) -> int:
    """Return the whole seconds after which the client of a refused request may try again."""
    models: Models = request.app.state.models
    gateway: Gateway | None = getattr(request.state, "gateway", None)
    return models.retry_after_s if gateway is None else gateway.retry_after_s
