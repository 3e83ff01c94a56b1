"""The other processes of one address, asked over Unix sockets in a private folder, by HTTP."""

import asyncio
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
MEMBERSHIP_ROUTE = "/siblings/membership"
LEARNERS_PROCESS = 0
"""The process to which learners report, whichever is asked: so each event of theirs is counted once."""

# Of a Unix socket in Linux, without the zero at its end.
_LONGEST_PATH_BYTES = 107
_ASKED_BY_SIBLING = "ares.asked_by_sibling"
_ASK_S = 2.0
# A move takes as long as its copy; and a command for all is not to wait for long.
_MOVE_S, _COMMAND_S = 300.0, 30.0
# Between two looks at whether a process that is to answer runs.
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """What a sibling answered."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body."""
        return msgspec.json.decode(self.body)


@dataclass(frozen=True, slots=True)
class _Command:
    """A client's request, to be sent to a process."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


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
    ended_metrics
        Counters of the processes that this one replaces (kept_metrics.py).
    """

    def __init__(self, folder: Path, counts: SharedCounts) -> None:
        self.counts = counts
        self.folder = folder
        self.showing_metrics = asyncio.Lock()
        self.ended_metrics = ""
        self._clients: dict[int, aiohttp.ClientSession] = {}
        # To each process, so that it gets them in the order in which they were given.
        self._commands: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._late: set[asyncio.Task[None]] = set()

    def check(self) -> None:
        """Raise AddressError where the sockets cannot be in the folder."""
        if len(os.fsencode(self.socket(self.counts.processes))) > _LONGEST_PATH_BYTES:
            raise AddressError(f"the path of {self.folder} is too long for Unix sockets: set TMPDIR to a shorter one")

    def make_folder(self) -> None:
        """Make the folder where something that cleans the temporary directory has removed it.

        Raises
        ------
        OSError
            It cannot be made; or it is there and others can open it: somebody else may have made it meanwhile.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{self.folder} is not a folder of this user alone")

    def socket(self, process: int) -> Path:
        """Return where a process listens for its siblings."""
        return self.folder / f"{process}.sock"

    async def ask(self, process: int, path: str) -> Answer | None:
        """Ask one process; None where it does not answer: it is starting, ending or stopped."""
        if not self.counts.responds(process):
            return None
        try:
            return await self._send(process, _Command("GET", path), _ASK_S)
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
        """Send a client's request to all other processes, with another body if one is given; log who refuses it.

        One that hangs, or is stopped, is not waited for: it gets the command when it runs again, and the log says both.
        """
        command = await _command(request, body)
        await asyncio.gather(*(self._tell(process, command) for process in self.counts.others))

    async def _tell(self, process: int, command: _Command) -> None:
        task = asyncio.create_task(self._deliver(process, command))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        if not await self._done(process, task, _COMMAND_S):
            text = "%s: process %s of this gateway does not run now; it gets the command when it does"
            logger.warning(text, command.path, self.counts.gateway_of(process))

    async def _deliver(self, process: int, command: _Command) -> None:
        """Send a command, and log why it was not carried out."""
        try:
            async with self._commands[process]:
                self._read_reply(process, await self._send(process, command, None))
        except SiblingRefusedError as refusal:
            logger.warning("%s: %s", command.path, refusal)
        except (aiohttp.ClientError, TimeoutError, OSError):
            logger.warning("%s: %s", command.path, self.unavailable(process))

    async def forward(self, process: int, request: Request) -> dict[str, Any]:
        """Send a client's request to one process; return the reply to it.

        Raises
        ------
        SiblingRefusedError
            It refused, or does not answer.
        """
        task = asyncio.create_task(self._send(process, await _command(request), _MOVE_S))
        try:
            if not await self._done(process, task, _MOVE_S):
                raise self.unavailable(process)
            return self._read_reply(process, task.result())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.unavailable(process) from error
        finally:
            task.cancel()

    async def _done(self, process: int, task: asyncio.Task[Any], within_s: float) -> bool:
        """Wait for a task that asks a process, for so many seconds and while that runs; return whether it is done."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
            if not self.counts.responds(process) or loop.time() > until:
                return False
        return True

    def _read_reply(self, process: int, answer: Answer) -> dict[str, Any]:
        """Return the body of a reply; SiblingRefusedError where it is an error, or no reply of an operator's route."""
        try:
            found = answer.json()
            if answer.status == 200:
                return dict(found)
            refusal = SiblingRefusedError(answer.status, found["error"]["message"], found["error"]["code"])
        except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
            text = f"process {self.counts.gateway_of(process)} of this gateway failed: status {answer.status}"
            raise SiblingRefusedError(502, text, "process_unavailable") from error
        raise refusal

    def unavailable(self, process: int) -> SiblingRefusedError:
        """Return the error where a process does not answer."""
        message = f"process {self.counts.gateway_of(process)} of this gateway does not answer; try again"
        return SiblingRefusedError(503, message, "process_unavailable")

    async def close(self) -> None:
        """Close the connections; what could not be delivered yet is given up."""
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def _send(self, process: int, command: _Command, timeout_s: float | None) -> Answer:
        client = self._clients.get(process)
        if client is None:
            # A connection a question: one that was kept could lead to a process that has ended since.
            connector = aiohttp.UnixConnector(str(self.socket(process)), force_close=True)
            client = self._clients[process] = aiohttp.ClientSession("http://localhost", connector=connector)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with client.request(
            command.method, command.path, data=command.body or None, headers=command.headers, timeout=timeout
        ) as reply:
            return Answer(reply.status, await reply.read())


async def _command(request: Request, body: bytes | None = None) -> _Command:
    headers = {name: request.headers[name] for name in ("authorization", "content-type") if name in request.headers}
    query = request.scope["query_string"].decode("ascii")
    path = request.scope["raw_path"].decode("ascii") + (f"?{query}" if query else "")
    return _Command(request.method, path, await request.body() if body is None else body, headers)


def mark(scope: Any) -> None:
    """Mark a request as a sibling's: it is answered for this process alone."""
    scope[_ASKED_BY_SIBLING] = True


def siblings_of(request: Request) -> Siblings | None:
    """Return the other processes to answer a request for; None where there are none, or where one of them asks."""
    if request.scope.get(_ASKED_BY_SIBLING):
        return None
    found: Siblings | None = request.app.state.siblings
    return found
