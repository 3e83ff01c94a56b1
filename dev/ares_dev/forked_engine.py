"""`python -m ares_dev.forked_engine worker ...`: an instance that starts in a fraction of the time.

Where a fork server runs (fork_server.py), the instance is forked from it. And its engine core is forked, as vLLM does
it on a GPU (v1/engine/utils.py). vLLM's CPU platform has the core import everything again
(`VLLM_WORKER_MULTIPROC_METHOD=spawn`, platforms/cpu.py, 0.32), because OpenMP does not survive a fork after its threads
have run; an instance with one thread never starts any. The core of an instance with more threads is started as vLLM
does it.
"""

import multiprocessing
import multiprocessing.context
import os
import sys
from typing import Any

from ares_dev import fork_server


def install() -> None:
    """Fork where this process would start a Python anew, if it computes with one thread."""
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
        return get_context("fork" if method == "spawn" and one_thread else method)

    multiprocessing.get_context = forking


def run(arguments: list[str]) -> None:
    """Run the `ares` command in this process."""
    from ares.cli import main as cli

    install()
    sys.argv = ["ares", *arguments]
    cli.main()


def main() -> None:
    """Run the `ares` command in this process, or in one of the fork server."""
    server = os.environ.get(fork_server.SERVER_VARIABLE)
    if server is None:
        run(sys.argv[1:])
    else:
        sys.exit(fork_server.start(server, sys.argv[1:]))


if __name__ == "__main__":
    main()
