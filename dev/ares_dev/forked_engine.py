"""`python -m ares_dev.forked_engine worker ...`: an instance whose engine core is forked, as vLLM does it on a GPU.

vLLM's CPU platform has its engine core import everything again (`VLLM_WORKER_MULTIPROC_METHOD=spawn`, platforms/cpu.py,
0.32), because OpenMP does not survive a fork after its threads have run; on a GPU the core is forked
(v1/engine/utils.py). An instance with one thread never starts any, so tests whose subject is not the start save about
8 s for each instance. The core of an instance with more threads is started as vLLM does it.
"""

import multiprocessing
import multiprocessing.context
import os
from typing import Any

from ares.cli import main as cli


def install() -> None:
    """Fork where this process would start a Python anew, if it computes with one thread."""
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
        return get_context("fork" if method == "spawn" and one_thread else method)

    multiprocessing.get_context = forking


def main() -> None:
    """Run the `ares` command in this way."""
    install()
    cli.main()


if __name__ == "__main__":
    main()
