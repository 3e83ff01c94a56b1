"""A direct route answers every request as FastAPI's own does."""

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


class Part(BaseModel):
    """A part of what the route takes."""

    size: int


class Body(BaseModel):
    """What the route takes."""

    count: int = Field(ge=1)
    text: str = ""
    part: Part | None = None


def client(route_class: type[APIRoute]) -> TestClient:
    """A client of an application with one route."""
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


IN_GENERAL, DIRECT = client(APIRoute), client(DirectRoute)


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
        b'{"count": 1, "part": 3}',
        b'{"count": 1, "part": {"size": "x"}}',
    ],
    ids=range(16),
)
def test_answers_are_those_of_fastapi(body: bytes, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    direct, general = (each.post("/", content=body, headers=headers) for each in (DIRECT, IN_GENERAL))
    assert (direct.status_code, direct.json()) == (general.status_code, general.json())


def test_a_well_formed_request_takes_the_direct_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unused(**_: Any) -> None:
        raise AssertionError("FastAPI looks for the arguments")

    monkeypatch.setattr("fastapi.routing.solve_dependencies", unused)
    assert DIRECT.post("/", json={"count": 3}).json()[0] == {"count": 3, "text": "", "part": None}
