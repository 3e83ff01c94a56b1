"""`/docs`: the OpenAPI document as one page, without a script and without anything from another host."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI
from jinja2 import Environment
from starlette.responses import HTMLResponse

_PAGES = resources.files("ares.gateway.http").joinpath("pages")
_STYLE = _PAGES.joinpath("reference.css").read_text()
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# Bodies that do something useful, for the routes whose required fields alone would not.
_BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 50},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 50},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hello"}]},
    "/tokenize": {"prompt": "Once upon a time"},
    "/detokenize": {"tokens": [1, 2, 3]},
}


@dataclass(frozen=True, slots=True)
class Field:
    """A parameter, or a field of a body; `note` is where it belongs, and its default."""

    name: str
    kind: str
    note: str
    description: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One route and method, as the page shows it."""

    anchor: str
    method: str
    path: str
    description: str
    example: str
    parameters: list[Field]
    body: list[Field]
    replies: list[tuple[str, str, list[str]]]


def register(app: FastAPI) -> None:
    """Serve the page at `/docs`; it is made when it is first asked for."""
    page: list[str] = []

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        if not page:
            page.append(render(app.openapi()))
        return HTMLResponse(page[0], headers=_HEADERS)


def render(document: dict[str, Any]) -> str:
    """Return an OpenAPI document as HTML."""
    schemas = document.get("components", {}).get("schemas", {})
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _PAGES.joinpath("reference.html").read_text()
    )
    return template.render(
        info=document["info"],
        style=_STYLE,
        operations=[
            _operation(method, path, described, schemas)
            for path, methods in document["paths"].items()
            for method, described in methods.items()
        ],
        schemas={name: (schema.get("description", ""), _fields(schema)) for name, schema in schemas.items()},
    )


def _operation(method: str, path: str, described: dict[str, Any], schemas: dict[str, Any]) -> Operation:
    content = described.get("requestBody", {}).get("content", {}).get("application/json", {})
    body = _resolved(content.get("schema", {}), schemas)
    replies = [
        (status, reply.get("description", ""), sorted(_kind(c.get("schema", {})) for c in reply["content"].values()))
        if reply.get("content")
        else (status, reply.get("description", ""), [])
        for status, reply in sorted(described["responses"].items())
    ]
    return Operation(
        anchor=re.sub(r"\W+", "-", f"{method}{path}").strip("-"),
        method=method.upper(),
        path=path,
        description=described.get("description", ""),
        example=_curl(method, path, body),
        parameters=[
            Field(p["name"], _kind(p["schema"]), _note(p["in"], p.get("required")), p.get("description", ""))
            for p in described.get("parameters", [])
        ],
        body=_fields(body),
        replies=replies,
    )


def _curl(method: str, path: str, body: dict[str, Any]) -> str:
    """Return a command line that asks for the route."""
    line = "curl" + (
        f" -X {method.upper()}" if method not in ("get", "post") or (method == "post" and not body) else ""
    )
    line += f" http://127.0.0.1:8000{path}"
    if body:
        required = {name: _placeholder(body["properties"][name]) for name in body.get("required", [])}
        line += f" \\\n  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(_BODIES.get(path, required))}'"
    return line


def _placeholder(schema: dict[str, Any]) -> Any:
    return {"string": "...", "integer": 1, "number": 1.0, "boolean": True, "array": []}.get(schema.get("type", ""), {})


def _fields(schema: dict[str, Any]) -> list[Field]:
    required = schema.get("required", [])
    return [
        Field(name, _kind(field), _note("", name in required, field), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]


def _note(place: str, required: bool | None, schema: dict[str, Any] | None = None) -> str:
    default = (schema or {}).get("default")
    given = "required" if required else f"default {json.dumps(default)}" if default is not None else "optional"
    return f"{place}, {given}" if place else given


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object, which a reference, or a choice between it and null, may stand for."""
    for choice in schema.get("anyOf", [schema]):
        if "$ref" in choice:
            return dict(schemas[_name(choice)])
    return schema


def _kind(schema: dict[str, Any]) -> str:
    """Say in a few words what a value may be."""
    if "$ref" in schema:
        return _name(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(choice) for choice in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([str(schema.get("type", "anything")), *bounds])


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]
