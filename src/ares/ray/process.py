"""The process of an instance, as the child of a Ray actor."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp

# Loaded before the fork: a child of a process with threads had better load nothing.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_ANSWER_S = 1.0
_LOG_LINES = 25


class ProcessError(RuntimeError):
    """The process does not run; the message has the end of its log."""


class InstanceProcess:
    """One `ares worker`, with its own process group. Its output goes where this process' errors go: Ray shows it.

    Parameters
    ----------
    arguments
        Of `ares`.
    url
        Where it answers.
    """

    def __init__(self, arguments: Sequence[str], url: str) -> None:
        self._url = url
        self._log = Path(f"/proc/self/fd/{sys.stderr.fileno()}").resolve()
        self._log_from = self._log.stat().st_size if self._log.is_file() else 0
        self._popen = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "ares", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            process_group=0,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - one call into the kernel
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    def check(self) -> None:
        """Raise ProcessError where it has ended."""
        code = self._popen.poll()
        if code is not None:
            how = f"ended with status {code}" if code >= 0 else f"was killed by signal {-code}"
            raise ProcessError(f"the instance's process {how}; {self._log_end()}")

    async def await_ready(self, timeout_s: float) -> None:
        """Wait until it answers; ProcessError where it ends before, or takes longer."""
        try:
            async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as http:
                while not await self._answers(http):
                    self.check()
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self.kill()
            raise ProcessError(
                f"the instance is not ready after {timeout_s:g} s (start_timeout_s); {self._log_end()}"
            ) from None

    async def stop(self, timeout_s: float) -> None:
        """Let it drain and end, and kill what is left of it after this time."""
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._popen.wait, timeout_s)
        self.kill()

    def kill(self) -> None:
        """Kill it with its children, which may have outlived it: an engine core would keep its memory."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    async def _answers(self, http: aiohttp.ClientSession) -> bool:
        try:
            async with http.get(f"{self._url}/health", timeout=aiohttp.ClientTimeout(total=_ANSWER_S)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    def _log_end(self) -> str:
        if not self._log.is_file():
            return "see the log of its actor"
        with self._log.open("rb") as log:
            log.seek(self._log_from)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join([f"the end of {self._log}:", *lines[-_LOG_LINES:]])


def _end_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the thread that has started it ends, as when its actor is killed.

    Its requests then move to other instances, and it ends.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
