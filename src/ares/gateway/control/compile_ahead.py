"""Compile the policies in a process of its own: a compiler leaves 200 MB in the process that it ran in.

The gateway then takes the code from numba's cache (policy/compiling.py).
"""

import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import ares
from ares.gateway.control import lengths
from ares.policy.compiling import cache_directory

logger = logging.getLogger(__name__)


def compile_ahead() -> None:
    """Fill the cache of compiled code, if it has not been filled before; without numba there is nothing to do."""
    done = _mark()
    if done is None or done.exists():
        return
    try:
        done.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(done.parent, os.W_OK):
            return
        command = [sys.executable, "-m", __name__]
        logger.info("compiling the policies, once for this installation; half a minute, more on busy CPUs")
        began = time.monotonic()
        status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode  # noqa: S603 - ours
        if status == 0:
            done.touch()
            logger.info("the policies are compiled, after %.0f s (%s)", time.monotonic() - began, done.parent)
        else:
            logger.warning("the policies were not compiled ahead (status %d): they are when needed", status)
    except OSError:  # no place for a cache: the code is compiled when it is needed
        return


def _mark() -> Path | None:
    """Return the file that marks the cache as filled, for this installation, numba and processor.

    Numba keeps the code of each place that sources are at apart, so that another installation of the same version
    (a new virtual environment, a second checkout) finds none.
    """
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return None
    lines = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    processor = sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    place = str(Path(ares.__file__).parent.resolve())
    digest = hashlib.sha256("\n".join([place, *processor]).encode()).hexdigest()[:16]
    return Path(cache_directory()) / f"filled-{sys.implementation.cache_tag}-{version}-{digest}"


if __name__ == "__main__":
    from ares.policy import oom_avoidance
    from ares.policy.admission import loop
    from ares.policy.rebalance import ares as rebalance

    rebalance.prepare()
    loop.prepare()
    oom_avoidance.prepare()
    lengths.prepare()
