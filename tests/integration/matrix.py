"""Rows: configurations of vLLM under which moves are compared, token by token, with runs on one instance."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from ares.engine.defaults import local_flags
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from tests.integration import matrix_models

_NO_PREFIX_CACHING = "--no-enable-prefix-caching"
# Prefill in chunks of 64 tokens.
_CHUNKS = ("--max-num-batched-tokens", "64", "--max-num-seqs", "32")
# One unbound thread a rank: vLLM's CPU build wants a NUMA node for each rank to bind, and a host may have one only.
_UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration.

    Attributes
    ----------
    name, what
        Its name, and what it is in a few words.
    build
        Writes its model; None is the tiny model itself.
    flags
        vLLM's, for every instance.
    decode_flags, decode_environment
        In addition, for decode instances.
    adapters
        Names of LoRA adapters that it is asked for, each prompt with each, besides the model itself.
    always
        Whether it runs with all other tests; the others run on demand, by the marker `matrix`.
    records
        Whether its decode instances record hidden states.
    modes
        The modes of moves, taken in turns.
    """

    name: str
    what: str
    build: Callable[[Path, Path], Path] | None = None
    flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    decode_environment: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    always: bool = False
    records: bool = False
    modes: tuple[str, ...] = ("stop_and_copy", "pre_copy")

    @property
    def ranks(self) -> int:
        """Workers of a decode instance."""
        return int(self.decode_flags[self.decode_flags.index("-tp") + 1]) if "-tp" in self.decode_flags else 1


ROWS = (
    Row(
        "lora",
        "two LoRA adapters and the model itself; blocks of 32; prefill in chunks of 64 tokens",
        flags=("--block-size", "32", *_CHUNKS),
        adapters=("first", "second"),
        always=True,
    ),
    Row(
        "tensor-parallel",
        "prefill on one rank, decode on two (gloo), hidden states recorded",
        decode_flags=("-tp", "2"),
        decode_environment=_UNBOUND,
        records=True,
        always=True,
    ),
    Row(
        "sliding-window",
        "three layers with a window of 128 tokens, one with full attention",
        matrix_models.sliding_window,
        # Blocks of several kinds are not copied ahead.
        modes=("stop_and_copy",),
        always=True,
    ),
    Row(
        "block-16",
        "blocks of 16, prefix caching off, prefill in chunks of 64 tokens",
        flags=("--block-size", "16", *_CHUNKS, _NO_PREFIX_CACHING),
        modes=("stop_and_copy",),
    ),
    Row(
        "fp8",
        "KV in fp8, blocks of 32, prefix caching off, prefill in chunks of 64 tokens",
        flags=("--kv-cache-dtype", "fp8", "--block-size", "32", *_CHUNKS, _NO_PREFIX_CACHING),
        modes=("stop_and_copy",),
        always=True,
    ),
)


@contextlib.contextmanager
def running(row: Row, base: Path, folder: Path) -> Iterator[local.Cluster]:
    """Run the cluster of a row, a prefill and two decode instances; it moves nothing by itself.

    Parameters
    ----------
    base
        Folder of the tiny model.
    folder
        For its model, adapters, logs and recordings.
    """
    model = row.build(base, folder / "model") if row.build else base
    flags = ["--dtype", "float32", "--max-model-len", "2048", "--kv-cache-memory-bytes", "16M", *row.flags]
    if row.adapters:
        built = [matrix_models.adapter(base, folder / name, n) for n, name in enumerate(row.adapters)]
        # One slot stays empty (engine/loaded_models.py).
        flags += ["--enable-lora", "--max-loras", str(len(built) + 1)]
        flags += ["--max-lora-rank", str(matrix_models.ADAPTER_RANK)]
        flags += ["--lora-modules", *(f"{path.name}={path}" for path in built)]
    settings = local.ClusterSettings(
        model=str(model),
        decode=2,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=folder / "logs",
        vllm_flags=tuple(local_flags(flags)),
        worker_module="ares_dev.forked_engine",
    )
    recorder = ("--record-hidden-states", str(folder / "states"), "--record-fraction", "1") if row.records else ()
    cores = local.core_bindings(1, settings.decode, sorted(os.sched_getaffinity(0)))
    with local.workers_only(settings) as cluster:
        cluster.start_worker("prefill-0", "prefill", cores[0])
        cluster.settings = replace(settings, vllm_flags=(*settings.vllm_flags, *row.decode_flags))
        with mock.patch.dict(os.environ, row.decode_environment):
            for n in range(settings.decode):
                cluster.start_worker(f"decode-{n}", "decode", None if row.ranks > 1 else cores[1 + n], recorder)
        cluster.await_workers()
        cluster.settings = settings
        cluster.start_gateway()
        cluster.await_gateway()
        yield cluster
