"""Gateways, as the learner sees them: they name their instances, and take its reports."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from ares.gateway.pool.published import is_loopback

logger = logging.getLogger(__name__)

_STATUS_ROUTE, _REPORT_ROUTE = "/admin/v1/status", "/admin/v1/predictor"
_SHOWN = 300
_TIMEOUT = aiohttp.ClientTimeout(total=10)


class Gateway:
    """One gateway. Each change of what is wrong with it is logged once."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._http = http
        self._wrong: dict[str, str] = {}
        # On loopback, its certificate is for the name that clients use (ares up).
        self._ssl = not is_loopback(urlsplit(url).hostname or "")

    async def instances(self) -> list[str] | None:
        """Return the base URLs of its instances; None where it does not answer."""

        async def ask() -> list[str]:
            async with self._http.get(self.url + _STATUS_ROUTE, timeout=_TIMEOUT, ssl=self._ssl) as reply:
                _check(reply.status)
                read: Any = await reply.json()
                return [str(instance["url"]).rstrip("/") for instance in read["instances"]]

        found: list[str] | None = await self._try("its instances are not known", ask)
        return found

    async def report(self, body: bytes) -> bool:
        """Send a report; return whether it has been taken."""

        async def send() -> bool:
            headers = {"Content-Type": "application/json"}
            url = self.url + _REPORT_ROUTE
            async with self._http.put(url, data=body, headers=headers, timeout=_TIMEOUT, ssl=self._ssl) as reply:
                if reply.status == 404:
                    raise _WrongError("it is of an earlier version, and shows nothing of the learner")
                if reply.status == 400:
                    raise _WrongError(f"it answers 400: {(await reply.text())[:_SHOWN]}")
                _check(reply.status)
                return True

        return bool(await self._try("it takes no report", send))

    async def _try(self, what: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        try:
            result = await ask()
        except _WrongError as error:
            self._note(what, str(error))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._note(what, str(error) or type(error).__name__)
        except (ValueError, KeyError, TypeError, RecursionError):
            self._note(what, "it answers with something else; is it a gateway of ARES?")
        else:
            if self._wrong.pop(what, None) is not None:
                logger.info("gateway %s answers again", self.url)
            return result
        return None

    def _note(self, what: str, why: str) -> None:
        if self._wrong.get(what) != why:
            logger.warning("gateway %s: %s: %s", self.url, what, why)
        self._wrong[what] = why


class _WrongError(Exception):
    """What a gateway answers instead."""


def _check(status: int) -> None:
    if status in (401, 403):
        raise _WrongError(f"it answers {status}; give its admin key with --admin-key-file or ARES_ADMIN_KEY")
    if status >= 300:
        raise _WrongError(f"it answers {status}")
