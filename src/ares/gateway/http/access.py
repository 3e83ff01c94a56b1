"""Access: clients by one of the configured keys, operators by their own; compared in constant time."""

import hashlib
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ares.gateway.http.responses import error
from ares.gateway.processes.shared_counts import SharedCounts

# Routes of probes and `ares up`, and the description of the API, which is the same everywhere: a browser that opens a
# page sends no key. The admin routes have a key of their own, and the dashboard holds no data.
_OPEN_ROUTES = frozenset(["/health", "/ready", "/version", "/docs", "/openapi.json"])
_ROUTES_OF_OTHER_KEYS = ("/admin/", "/dashboard", "/workers")
_METRICS = "/metrics"
# Where Anthropic's clients put their keys, and where those of other APIs do.
_CLIENT_KEY = "x-api-key"
_OTHER_KEY_HEADERS = (_CLIENT_KEY, "api-key")
_STREAMS = "ares.streams"
_LOOPBACK_HOST = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?", re.IGNORECASE)


def bearer(headers: Headers) -> str:
    """Return the key of a request; empty where it has none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def client_key(headers: Headers) -> str:
    """Return the key of a client, from `Authorization` or else from `x-api-key`; empty where it has none."""
    return bearer(headers) or headers.get(_CLIENT_KEY, "").strip()


def unknown_key(headers: Headers, given: str, needed: str) -> str:
    """Return why the key of a request is refused, and how to send one; the key itself is not repeated.

    Parameters
    ----------
    given
        The key; empty where there is none.
    needed
        The message where there is no key.
    """
    how = "Authorization: Bearer KEY"
    if given:
        return f"this key is not known here; {needed}"
    if headers.get("authorization", ""):
        return f"the Authorization header must read: {how}"
    other = next((name for name in _OTHER_KEY_HEADERS if name in headers), None)
    return f"{needed}: {how}" + (f" (instead of the header {other})" if other else "")


def matches(given: str, key: SecretStr) -> bool:
    """Whether a given key is the right one; the time that it takes reveals nothing about either."""
    return secrets.compare_digest(_digest(given), _digest(key.get_secret_value()))


def foreign_origin(headers: Headers) -> str | None:
    """Return why a request to loopback seems to come from a foreign web page; None where it does not.

    A browser on this machine sends requests for any page. It names the page in `Origin` and `Sec-Fetch-Site`; a page
    whose name was made to resolve to loopback (DNS rebinding) has that name in `Host`.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _LOOPBACK_HOST.fullmatch(hosts[0]):
        return "Host is not a name of loopback"
    if any(origin.partition("://")[2].lower() != hosts[0].lower() for origin in headers.getlist("origin")):
        return "Origin is another host"
    if any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
        return "Sec-Fetch-Site is another site"
    return None


class TooManyStreamsError(Exception):
    """The request has more sessions than may run for its key now."""


class _Streams:
    """The sessions of one request, counted for its key: one until their number is known."""

    def __init__(self, running: Counter[int], counts: SharedCounts, key: int, maximum: int) -> None:
        self._running, self._counts, self._key, self._maximum = running, counts, key, maximum
        self._taken = 0

    def take(self, count: int) -> None:
        # Counted before it is checked: of two processes that take the last ones at the same time at least one sees the
        # other. Both may be refused then; one that is, counts no more, so that it keeps nobody else out.
        self._count(count)
        running = self._running[self._key] + self._counts.other_streams(self._key)
        if running > self._maximum:
            self._count(0)
            wanted = f", and {count} would come" if count > 1 else ""
            already = f"{running - count} sequences of this key run already{wanted}"
            raise TooManyStreamsError(f"{already}; at most {self._maximum} may at a time")

    def close(self) -> None:
        self._count(0)

    def _count(self, taken: int) -> None:
        """Count the request as so many sessions from now on."""
        self._running[self._key] += taken - self._taken
        self._taken = taken
        self._counts.set_streams(self._key, self._running[self._key])


def take_streams(scope: Scope, count: int) -> None:
    """Count a request as so many sessions of its key until it ends; TooManyStreamsError where they do not fit."""
    streams: _Streams | None = scope.get(_STREAMS)
    if streams is not None:
        streams.take(count)


def too_many_streams(failure: TooManyStreamsError, retry_after_s: int) -> Response:
    """Return the reply for `TooManyStreamsError`."""
    return error(429, str(failure), code="rate_limit_exceeded", headers={"Retry-After": str(retry_after_s)})


class ClientKeys:
    """Refuses requests without one of the keys, before any of their body is read; without keys it refuses none.

    Parameters
    ----------
    keys
        The keys.
    protect_metrics
        Whether `/metrics` needs one too.
    maximum_streams
        Sessions that may run for one key at a time; None sets no limit.
    retry_after_s
        Returns the `Retry-After` of refused requests.
    counts
        Those that the processes of the gateway share, with one of each key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[SecretStr],
        *,
        protect_metrics: bool,
        maximum_streams: int | None,
        retry_after_s: Callable[[], int],
        counts: SharedCounts,
    ) -> None:
        self._app = app
        self._counts = counts
        self._maximum, self._retry_after_s = maximum_streams, retry_after_s
        self._running: Counter[int] = Counter()
        self._digests = [_digest(key.get_secret_value()) for key in keys]
        self._open = _OPEN_ROUTES if protect_metrics else _OPEN_ROUTES | {_METRICS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 (the ASGI interface)."""
        if scope["type"] != "http" or not self._digests:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = client_key(headers)
        given = _digest(key)
        # All keys are compared: the time does not reveal which one it was.
        found = [number for number, digest in enumerate(self._digests) if secrets.compare_digest(given, digest)]
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not found and path not in self._open and not path.startswith(_ROUTES_OF_OTHER_KEYS):
            message = unknown_key(headers, key, "this needs an API key")
            refusal = error(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
            return
        if not found or self._maximum is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        streams = scope[_STREAMS] = _Streams(self._running, self._counts, found[0], self._maximum)
        try:
            streams.take(1)  # where as many run as may, it is refused before the body is read
        except TooManyStreamsError as failure:
            await too_many_streams(failure, self._retry_after_s())(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            streams.close()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
