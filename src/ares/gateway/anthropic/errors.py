"""Anthropic's error form."""

from typing import Any

MESSAGES_ROUTE = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return Anthropic's error object for an HTTP status."""
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def is_form_of(path: str) -> bool:
    """Whether the errors of a route have this form: those of `/v1/messages`, and below it."""
    return path == MESSAGES_ROUTE or path.startswith(MESSAGES_ROUTE + "/")
