"""Routes whose well-formed requests reach their function directly, past FastAPI's general way to its arguments."""

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

_JSON = "application/json"


class DirectRoute(APIRoute):
    """A route of a function that takes a body and the request, in this order, and returns the response.

    FastAPI looks for arguments in path, query, headers and cookies of every request, which took it as long as all else
    that a request needs before it is tokenised. It still answers each request whose body is no JSON object.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        in_general = super().get_route_handler()
        respond = self.endpoint
        model: type[BaseModel] = next(iter(inspect.signature(respond).parameters.values())).annotation

        async def handle(request: Request) -> Response:
            if request.headers.get("content-type") != _JSON:
                return await in_general(request)
            try:
                given = await request.json()
            except (ValueError, RecursionError, ClientDisconnect):
                return await in_general(request)
            if not isinstance(given, dict):
                return await in_general(request)
            try:
                body = model.model_validate(given, from_attributes=True)  # as FastAPI does
            except ValidationError as failure:
                mistakes = [{**one, "loc": ("body", *one["loc"])} for one in failure.errors(include_url=False)]
                raise RequestValidationError(mistakes, body=given) from failure
            response: Response = await respond(body, request)
            return response

        return handle
