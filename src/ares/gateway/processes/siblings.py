"""The other processes of one address, asked over Unix sockets in a private folder, by HTTP."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from starlette.requests import Request

from ares.addresses import AddressError
from ares.gateway.processes.shared_counts import SharedCounts

logger = logging.getLogger(__name__)

# Where a process answers its siblings, and nobody else.
STATUS_ROUTE = "/siblings/status"
REQUESTS_ROUTE = "/siblings/requests"
METRICS_ROUTE = "/siblings/metrics"
LEARNERS_PROCESS = 0
"""The process to which learners report, whichever is asked: so each event of theirs is counted once."""

# Of a Unix socket in Linux, without the zero at its end.
_LONGEST_PATH_BYTES = 107
_ASKED_BY_SIBLING = "ares.asked_by_sibling"
_ASK_S = 2.0
# A move takes as long as its copy; and a command for all is not to wait for a process that hangs.
_MOVE_S, _COMMAND_S = 300.0, 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a sibling answered."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body."""
        return msgspec.json.decode(self.body)


class SiblingRefusedError(Exception):
    """A sibling refused a command, or could not be asked; `status` is the HTTP status of the reply."""

    def __init__(self, status: int, message: str, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Siblings:
    """The other processes of an address.

    Parameters
    ----------
    folder
        Of their sockets; only the user of the processes can open it.
    counts
        Who they are.

    Attributes
    ----------
    showing_metrics
        Held while the metrics of this process are made and kept: the newest are to be kept.
    """

    def __init__(self, folder: Path, counts: SharedCounts) -> None:
        self.counts = counts
        self.folder = folder
        self.showing_metrics = asyncio.Lock()
        self._clients: dict[int, aiohttp.ClientSession] = {}

    def check(self) -> None:
        """Raise AddressError where the sockets cannot be in the folder."""
        if len(os.fsencode(self.socket(self.counts.processes))) > _LONGEST_PATH_BYTES:
            raise AddressError(f"the path of {self.folder} is too long for Unix sockets: set TMPDIR to a shorter one")

    def make_folder(self) -> None:
        """Make the folder where something that cleans the temporary directory has removed it."""
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def socket(self, process: int) -> Path:
        """Return where a process listens for its siblings."""
        return self.folder / f"{process}.sock"

    async def ask(self, process: int, path: str) -> Answer | None:
        """Ask one process; None where it does not answer: it is starting, ending or stopped."""
        try:
            return await self._send(process, "GET", path, b"", {}, _ASK_S)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def ask_all(self, path: Callable[[int], str]) -> dict[int, Answer]:
        """Ask all others at the same time, each for its path; return the answers of those that gave one."""
        others = self.counts.others
        answers = await asyncio.gather(*(self.ask(process, path(process)) for process in others))
        return {
            n: answer for n, answer in zip(others, answers, strict=True) if answer is not None and answer.status == 200
        }

    async def tell_others(self, request: Request, body: bytes | None = None) -> None:
        """Send a client's request to all other processes, with another body if one is given; log who refuses it."""
        others = self.counts.others
        sent = (self.forward(process, request, body, _COMMAND_S) for process in others)
        for answer in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(answer, SiblingRefusedError):
                logger.warning("%s: %s", request.scope["path"], answer)
            elif isinstance(answer, BaseException):
                raise answer

    async def forward(
        self, process: int, request: Request, body: bytes | None = None, timeout_s: float = _MOVE_S
    ) -> dict[str, Any]:
        """Send a client's request to one process, with another body if one is given; return the reply to it.

        Raises
        ------
        SiblingRefusedError
            It refused, or does not answer.
        """
        headers = {name: request.headers[name] for name in ("authorization", "content-type") if name in request.headers}
        query = request.scope["query_string"].decode("ascii")
        path = request.scope["raw_path"].decode("ascii") + (f"?{query}" if query else "")
        sent = await request.body() if body is None else body
        try:
            answer = await self._send(process, request.method, path, sent, headers, timeout_s)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.unavailable(process) from error
        found = answer.json()
        if answer.status != 200:
            raise SiblingRefusedError(answer.status, found["error"]["message"], found["error"]["code"])
        return dict(found)

    def unavailable(self, process: int) -> SiblingRefusedError:
        """Return the error where a process does not answer."""
        message = f"process {self.counts.gateway_of(process)} of this gateway does not answer; try again"
        return SiblingRefusedError(503, message, "process_unavailable")

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def _send(
        self, process: int, method: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float
    ) -> Answer:
        client = self._clients.get(process)
        if client is None:
            # A connection a question: one that was kept could lead to a process that has ended since.
            connector = aiohttp.UnixConnector(str(self.socket(process)), force_close=True)
            client = self._clients[process] = aiohttp.ClientSession("http://localhost", connector=connector)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with client.request(method, path, data=body or None, headers=headers, timeout=timeout) as reply:
            return Answer(reply.status, await reply.read())


def mark(scope: Any) -> None:
    """Mark a request as a sibling's: it is answered for this process alone."""
    scope[_ASKED_BY_SIBLING] = True


def siblings_of(request: Request) -> Siblings | None:
    """Return the other processes to answer a request for; None where there are none, or where one of them asks."""
    if request.scope.get(_ASKED_BY_SIBLING):
        return None
    found: Siblings | None = request.app.state.siblings
    return found
