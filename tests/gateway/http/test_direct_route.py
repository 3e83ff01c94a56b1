"""A direct route answers every request as FastAPI's own does."""

import functools
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from ares.gateway.http.direct_route import DirectRoute

JSON = "application/json"


class Body(BaseModel):
    """What the route takes."""

    count: int = Field(ge=1)
    text: str = ""


@functools.cache
def client(route_class: type[APIRoute]) -> TestClient:
    """An application with one route."""
    router = APIRouter(route_class=route_class)

    @router.post("/")
    async def echo(body: Body, request: Request) -> Response:
        return JSONResponse([body.model_dump(), request.headers["content-type"], repr(await request.body())])

    app = FastAPI()
    app.include_router(router)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, failure: Exception) -> Response:
        assert isinstance(failure, RequestValidationError)
        return JSONResponse([repr(failure.errors()), repr(failure.body)], 422)

    return TestClient(app)


@pytest.mark.parametrize("kind", [JSON, f"{JSON}; charset=utf-8", "text/plain", None])
@pytest.mark.parametrize(
    "body",
    [
        b'{"count": 1, "text": "\\u00e9 \xc3\xa9"}',
        b'{"count": "2", "other": null}',
        b'{"count": 0}',
        b'{"count": NaN}',
        b"{}",
        b"[]",
        b"null",
        b"",
        b"{",
        b'{"count": 1}x',
        b'{"count": 1, "text": "\xff"}',
        '{"count": 1}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"count": %s}' % (b"1" * 5000),
    ],
    ids=range(14),
)
def test_answers_are_those_of_fastapi(body: bytes, kind: str | None) -> None:
    def answer(route_class: type[APIRoute]) -> Any:
        headers = {} if kind is None else {"Content-Type": kind}
        reply = client(route_class).post("/", content=body, headers=headers)
        return reply.status_code, reply.json()

    assert answer(DirectRoute) == answer(APIRoute)


def test_a_well_formed_request_takes_the_direct_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unused(**_: Any) -> None:
        raise AssertionError("FastAPI looks for the arguments")

    monkeypatch.setattr("fastapi.routing.solve_dependencies", unused)
    assert client(DirectRoute).post("/", json={"count": 3}).json()[0] == {"count": 3, "text": ""}
