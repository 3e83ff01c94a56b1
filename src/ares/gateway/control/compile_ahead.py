"""Compile the policies in a process of its own: a compiler leaves 200 MB in the process that it ran in.

The gateway then takes the code from numba's cache (policy/compiling.py).
"""

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from ares.gateway.control import lengths
from ares.policy.compiling import cache_directory


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
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0:  # noqa: S603 - ours
            done.touch()
    except OSError:  # no place for a cache: the code is compiled when it is needed
        return


def _mark() -> Path | None:
    """Return the file that marks the cache as filled, for this numba and this processor."""
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return None
    lines = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    processor = sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    digest = hashlib.sha256("\n".join(processor).encode()).hexdigest()[:16]
    return Path(cache_directory()) / f"filled-{sys.implementation.cache_tag}-{version}-{digest}"


if __name__ == "__main__":
    from ares.policy import oom_avoidance
    from ares.policy.admission import loop
    from ares.policy.rebalance import ares as rebalance

    rebalance.prepare()
    loop.prepare()
    oom_avoidance.prepare()
    lengths.prepare()
