"""Exceptions as error replies, with the status, and the field where one is wrong."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ares.gateway.http import admin
from ares.gateway.http.access import TooManyStreamsError, too_many_streams
from ares.gateway.http.chosen import retry_after_s
from ares.gateway.http.generation import describe_failure
from ares.gateway.http.responses import error
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.parsing import ParserFailedError
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.processes.siblings import SiblingRefusedError
from ares.gateway.shutdown import ShuttingDownError

_SEVERAL_TYPES = {
    "arguments": "an object, or its JSON as text",
    "content": "text, or a list of parts",
    "prompt": "text, token ids, or a list of either",
    "stop": "text, or a list of texts",
}


def register(app: FastAPI) -> None:
    """Let an application answer every exception of its routes with an error reply."""
    app.add_exception_handler(BadRequestError, _bad_request)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(admin.AdminError, _admin)
    app.add_exception_handler(SiblingRefusedError, _admin)
    app.add_exception_handler(TooManyStreamsError, _too_many_streams)
    app.add_exception_handler(HTTPException, _http)
    for kind in (
        NoInstanceError,
        ShuttingDownError,
        EngineLostError,
        EngineRefusedError,
        ParserFailedError,
        Exception,
    ):
        app.add_exception_handler(kind, _generation)


# Starlette's signature of a handler takes any exception; each of these gets those that it is registered for.


async def _bad_request(_: Request, failure: Exception) -> JSONResponse:
    assert isinstance(failure, BadRequestError)  # noqa: S101 - for the type checker, here and below
    return error(failure.status, str(failure), failure.param, failure.code)


async def _invalid(request: Request, failure: Exception) -> JSONResponse:
    assert isinstance(failure, RequestValidationError)  # noqa: S101
    first = failure.errors()[0]
    if first["loc"][0] == "body" and (reason := _not_json(request)) is not None:
        return error(415, reason)
    if first["type"] == "json_invalid":
        return error(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        return error(400, f"the body must be a JSON object{'' if failure.body else '; it is empty'}")
    name = _path(first["loc"][1:], failure.body, missing=first["type"] == "missing")
    message = _wanted(name) or first["msg"].removeprefix("Value error, ")
    return error(400, f"{name}: {message}" if name else message, name or None)


async def _admin(_: Request, failure: Exception) -> JSONResponse:
    assert isinstance(failure, admin.AdminError | SiblingRefusedError)  # noqa: S101
    return error(failure.status, str(failure), code=failure.code)


async def _too_many_streams(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, TooManyStreamsError)  # noqa: S101
    return too_many_streams(failure, retry_after_s(request))


async def _http(request: Request, failure: Exception) -> JSONResponse:
    assert isinstance(failure, HTTPException)  # noqa: S101
    if failure.status_code == 400 and (reason := _not_json(request)) is not None:
        return error(415, reason)
    message = str(failure.detail)
    if failure.status_code == 400 and failure.__cause__ is not None:
        message = f"the body is not JSON that can be read: {_unreadable(failure.__cause__)}"
    if failure.status_code == 404:
        # Not `request.url`: it is put together with the client's Host header, and need not be a URL.
        message = f"no such route: {request.method} {request.scope['path']}"
    headers = dict(failure.headers or {})
    if failure.status_code == 405:
        allowed = headers["Allow"] = headers.get("Allow", "").replace("GET", "GET, HEAD")
        message = f"{request.method} is not allowed for {request.scope['path']}; allowed: {allowed}"
    return error(failure.status_code, message, headers=headers)


async def _generation(request: Request, failure: Exception) -> JSONResponse:
    status, message, code = describe_failure(failure)
    later = {"Retry-After": str(retry_after_s(request))}
    return error(status, message, code=code, headers=later if status == 503 else None)


def _not_json(request: Request) -> str | None:
    """Return why a body is not read, by its headers; None where they declare JSON."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        return f"Content-Encoding {encoding} is not taken: send the body as it is"
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        return f"the body must be JSON, with Content-Type: application/json{kind and f' instead of {kind}'}"
    return None


def _unreadable(cause: BaseException) -> str:
    """Return why a body could not be read, where that is more than a mistake in its JSON."""
    match cause:
        case UnicodeDecodeError():
            return "it is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
        case ValueError():
            return "one of its numbers is too long"
    return type(cause).__name__


def _wanted(name: str) -> str | None:
    """Return the types of a field that takes several; pydantic's own message names only the first."""
    field = name.rpartition(".")[2]
    return f"should be {_SEVERAL_TYPES[field]}" if field in _SEVERAL_TYPES else None


def _path(location: tuple[Any, ...], body: Any, *, missing: bool) -> str:
    """Return the path of a mistake in the client's body; pydantic's own also has the types that it tried."""
    path: list[str] = []
    *tried, last = location or ("",)
    for part in tried if missing else location:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            path.append(str(part))
    return ".".join([*path, str(last)] if missing else path)
