"""A job's process, as the learner sees it: it is started, followed, and killed where it takes too long."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable

import msgspec

from ares.learner.jobs import Failed, Job, Judged, Progress, Reply, Trained

_REPLY_BYTES = 64 << 20
_STDERR_BYTES = 2000
_decode = msgspec.json.Decoder(Reply).decode


class JobError(Exception):
    """A job has failed; the message is the reason."""


async def run(job: Job, timeout_s: float, on_progress: Callable[[Progress], None]) -> Trained | Judged:
    """Run a job in a process of its own and return its result.

    Raises
    ------
    JobError
        It failed, was killed, or took too long.
    """
    threads = str(job.threads)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ares.learner.jobs",
        str(os.getpid()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Before torch is imported: its own setting comes too late for the libraries below it.
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        limit=_REPLY_BYTES,
    )
    try:
        async with asyncio.timeout(timeout_s):
            return await _follow(process, job, on_progress)
    except TimeoutError:
        raise JobError(f"it took longer than {timeout_s:.0f} s and was killed") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _follow(
    process: asyncio.subprocess.Process, job: Job, on_progress: Callable[[Progress], None]
) -> Trained | Judged:
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
    if stdin is None or stdout is None or stderr is None:
        raise JobError("its process has no pipes")
    errors = asyncio.ensure_future(stderr.read())
    with contextlib.suppress(ConnectionError):
        stdin.write(msgspec.json.encode(job))
        await stdin.drain()
        stdin.close()
    reply: Reply | None = None
    try:
        async for line in stdout:
            reply = _decode(line)
            if isinstance(reply, Progress):
                on_progress(reply)
    except ValueError as error:  # no reply, or a longer line than any
        raise JobError(f"its process wrote something else than a reply: {error}") from error
    status, said = await process.wait(), (await errors)[-_STDERR_BYTES:].decode(errors="replace").strip()
    if isinstance(reply, Failed):
        raise JobError(reply.text)
    if not isinstance(reply, Trained | Judged):
        last = said.splitlines()[-1] if said else "it printed nothing"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise JobError(f"its process {how}: {last}")
    return reply
