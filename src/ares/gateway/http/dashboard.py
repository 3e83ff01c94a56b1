"""`/dashboard`: the operator's page. It holds no data; all that it shows comes from `/admin/v1/events`."""

from importlib import resources

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

_TYPES = {
    "dashboard.html": "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "commands.js": "text/javascript; charset=utf-8",
    "elements.js": "text/javascript; charset=utf-8",
    "feed.js": "text/javascript; charset=utf-8",
    "happened.js": "text/javascript; charset=utf-8",
    "learner.js": "text/javascript; charset=utf-8",
    "model.js": "text/javascript; charset=utf-8",
    "requests.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_FILES = {name: resources.files("ares.gateway.http").joinpath("static", name).read_bytes() for name in _TYPES}
# Nothing from elsewhere, nothing inline, and no string ever becomes markup: request ids come from clients.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/dashboard")
async def page() -> Response:
    """Return the page."""
    return _file("dashboard.html")


@router.get("/dashboard/{name}")
async def part(name: str) -> Response:
    """Return one of the files that the page loads."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _FILES:
        raise HTTPException(404)
    return Response(_FILES[name], media_type=_TYPES[name], headers=_HEADERS)
