"""Asking an instance over HTTP for its description, and whether it can be used here."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
import msgspec

from ares.gateway.pool import published
from ares.gateway.pool.generate import whole_body
from ares.gateway.pool.health import Health, Status
from ares.protocol import messages
from ares.protocol.fields import INSTANCE_ROUTE, MODELS_ROUTE

_DESCRIPTION_TIMEOUT_S = 5.0
_MAXIMUM_DESCRIPTION_BYTES = 1 << 16
# vLLM guards this one by its key, and not ours (entrypoints/serve/middleware/authenticate.py, 0.32).
_ROUTE_OF_VLLM_KEY = MODELS_ROUTE


class Choice(Protocol):
    """Knows which of a gateway's models an instance serves (pools.py)."""

    def take(self, served: "Served", url: str, found: messages.Description) -> bool: ...  # noqa: D102

    def difference(self, served: "Served", found: messages.Description) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a gateway serves: the names it goes by, and the numbers of its configuration (`model.shape`).

    Attributes
    ----------
    choice
        Tells it from the gateway's other models; None: it is the only one.
    """

    names: tuple[str, ...]
    shape: Mapping[str, int] = field(default_factory=dict)
    choice: Choice | None = None

    def elsewhere(self, url: str, found: messages.Description) -> bool:
        """Whether an instance serves another model of the gateway; then it is taken over into that one's pool."""
        return self.choice is not None and self.choice.take(self, url, found)

    def difference(self, found: messages.Description) -> str | None:
        """Return how an instance's model differs; None where nothing shows a difference."""
        return another_model(found, self) if self.choice is None else self.choice.difference(self, found)


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why an instance cannot be used: its status, and the cause."""

    status: Status
    cause: str


async def describe(http: aiohttp.ClientSession, url: str) -> messages.Description | Unusable:
    """Ask an instance for its description.

    Parameters
    ----------
    http
        Sends the key of the instances.
    url
        Base URL of the instance, without a slash at its end.
    """
    timeout = aiohttp.ClientTimeout(total=_DESCRIPTION_TIMEOUT_S)
    try:
        async with http.get(url + INSTANCE_ROUTE, timeout=timeout) as reply:
            if reply.status != 200:
                return _refusal(reply.status)
            body = await whole_body(reply, _MAXIMUM_DESCRIPTION_BYTES)
            found = msgspec.json.decode(body, type=messages.Description)
        async with http.get(url + _ROUTE_OF_VLLM_KEY, timeout=timeout) as reply:
            if reply.status in (401, 403):
                return _refusal(reply.status)
    except (TimeoutError, asyncio.IncompleteReadError):
        return Unusable(
            Status.UNREACHABLE, f"no answer within {_DESCRIPTION_TIMEOUT_S:g} s; is it still starting, or overloaded?"
        )
    except (aiohttp.ClientPayloadError, aiohttp.ClientResponseError, msgspec.DecodeError, ValueError, RecursionError):
        return Unusable(
            Status.NOT_AN_INSTANCE,
            f"it answers GET {INSTANCE_ROUTE} with something else; does another program use that port?",
        )
    except (aiohttp.ClientError, OSError) as error:
        return Unusable(Status.UNREACHABLE, f"{_reason(error)}; start it, or correct its --worker URL")
    return found


def key_refused(status: int) -> str:
    """Return what a status of 401 or 403 means, and what to do."""
    return (
        f"it answers {status}; give the gateway the key of the instance's VLLM_API_KEY (--worker-api-key-file or "
        "ARES_WORKER_API_KEY)"
    )


def _refusal(status: int) -> Unusable:
    if status in (401, 403):
        return Unusable(Status.KEY_REFUSED, key_refused(status))
    if status >= 500:
        return Unusable(
            Status.UNREACHABLE, f"it answers GET {INSTANCE_ROUTE} with {status}; see its log, or its proxy's"
        )
    return Unusable(
        Status.NOT_AN_INSTANCE,
        f"it answers GET {INSTANCE_ROUTE} with {status}; start it with `ares worker` "
        "(a plain `vllm serve` has no ARES plugin)",
    )


def _reason(error: Exception) -> str:
    """Return in a few words what went wrong, without the address, which is known."""
    found = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(found, OSError) and found.strerror:
        # asyncio's own text repeats the address: "Connect call failed ('127.0.0.1', 9)".
        return "connection refused" if isinstance(found, ConnectionRefusedError) else found.strerror
    return str(found) or type(found).__name__


def another_model(found: messages.Description, ours: Served) -> str | None:
    """Return how an instance's model differs from ours; None where nothing shows a difference.

    Numbers of the two configurations must agree where both are known. Names must have one in common, where both sides
    have one that is no folder: a folder on one host cannot be compared with a folder, or an id, on another.
    """
    for name, value in found.shape.items():
        if ours.shape.get(name, value) != value:
            return f"it has {name} {value}, and {ours.names[0]} has {ours.shape[name]}"
    theirs, known = _comparable(found.models), _comparable(ours.names)
    if not theirs or not known or theirs.keys() & known.keys():
        return None
    return (
        f"{', '.join(theirs.values())} instead of {', '.join(known.values())}; if these are the same, start the "
        f"instance with --served-model-name {next(iter(known.values()))}"
    )


def same_name(found: messages.Description, ours: Served) -> bool:
    """Whether an instance goes by a name of a model; a folder may be the same on one host."""
    return bool(_comparable(found.models).keys() & _comparable(ours.names).keys()) or bool(
        {*found.models} & {*ours.names}
    )


def _comparable(names: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Return the names that are no folders, by their lower-case form: hubs ignore the case of ids."""
    return {name.casefold(): name for name in names if not name.startswith(("/", "./", "../", "~"))}


class Discovery:
    """An instance's description over HTTP, and its status by that.

    Parameters
    ----------
    url
        Its base URL, without a slash at its end.
    http
        Sends the key of the instances.
    served
        The gateway's model; None takes instances of any.
    health
        The instance's, whose status is set where it cannot be used.
    """

    def __init__(self, url: str, http: aiohttp.ClientSession, served: Served | None, health: Health) -> None:
        self._url, self._http, self._served, self._health = url, http, served, health

    async def answers(self) -> bool:
        """Whether an instance answers at the URL."""
        return isinstance(await describe(self._http, self._url), messages.Description)

    async def look(self, name: str) -> messages.Description | None:
        """Return the instance's description; None where it cannot be used, and then its health has the cause.

        Parameters
        ----------
        name
            What the log calls it.
        """
        found = await describe(self._http, self._url)
        if isinstance(found, messages.Description):
            if self._served is not None and self._served.elsewhere(self._url, found):
                return None
            unusable = await self._unusable(found)
            if unusable is None:
                return found
            found = unusable
        if self._health.status is not Status.DUPLICATE:  # else the status of its other URL counts
            lost = found.status is Status.UNREACHABLE and self._health.served
            # If it has served, the address is right, and it may start again by itself: no advice.
            cause = found.cause.partition(";")[0] if lost else found.cause
            self._health.set_status(name, Status.LOST if lost else found.status, cause)
        return None

    async def _unusable(self, found: messages.Description) -> Unusable | None:
        if self._served is not None and (cause := self._served.difference(found)) is not None:
            return Unusable(Status.OTHER_MODEL, cause)
        cause = published.wildcard(found) or await published.on_another_host(found, self._url)
        return Unusable(Status.WRONG_ADDRESS, cause) if cause is not None else None
