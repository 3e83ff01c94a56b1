"""The transport that UCX reads KV over, from the log of an instance that was started with ``UCX_PROTO_INFO=y``.

For each kind of transfer UCX 1.18 to 1.22 print a table (src/ucp/proto/proto_debug.c): a title, then a row for each
range of sizes with the method and the lane. NIXL pulls by `ucp_get`, so that only those tables count, and of them the
last range, which has no upper end: KV blocks are large.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

VARIABLE = "UCX_PROTO_INFO"
_TITLE = re.compile(
    r"\|\s*(?P<context>[^|]*?cfg#\d+)\s*\|\s*remote memory read by ucp_get[^|]*?(?P<memory>into [^|]*?)?\s*\|"
)
_ROW = re.compile(r"\|\s*(?:\d[\w.]*\.\.inf|0\.\.inf)\s*\|\s*(?P<method>[^|]*?)\s*\|\s*(?P<lane>[^|]*?)\s*\|")
_OTHER_TITLE = re.compile(r"\|\s*[^|]*?cfg#\d+\s*\|")


class Transport(StrEnum):
    """The kind of a lane."""

    CUDA_IPC = "cuda_ipc"
    RDMA = "RDMA"
    SHARED_MEMORY = "shared memory"
    TCP = "TCP"
    OTHER = "another transport"


# The transports of UCX by the beginning of their names.
_KINDS = {
    ("cuda_ipc", "rocm_ipc", "ze_ipc"): Transport.CUDA_IPC,
    ("rc", "dc", "ud", "gga", "srd"): Transport.RDMA,
    ("cma", "posix", "sysv", "xpmem", "knem", "self"): Transport.SHARED_MEMORY,
    ("tcp",): Transport.TCP,
}


@dataclass(frozen=True, slots=True)
class Read:
    """How UCX reads large pieces of a peer's memory.

    Attributes
    ----------
    memory
        From and into which kind of memory, in UCX's words.
    method
        Such as ``zero-copy``.
    lanes
        Such as ``rc_mlx5/mlx5_0:1``.
    """

    memory: str
    method: str
    lanes: str

    @property
    def transport(self) -> Transport:
        """The kind of its first lane."""
        name = self.lanes.partition("/")[0].strip()
        for beginnings, kind in _KINDS.items():
            if name.split("_")[0] in beginnings or name.startswith(beginnings):
                return kind
        return Transport.OTHER

    @property
    def emulated(self) -> bool:
        """Whether the peer's processor sends the data, instead of the transport reading it."""
        return "software emulation" in self.method


def reads(log: str) -> list[Read]:
    """Return the reads that a log names, each once, in the order of the log."""
    found: dict[Read, None] = {}
    memory: str | None = None
    for line in log.splitlines():
        if (title := _TITLE.search(line)) is not None:
            memory = (title["memory"] or "").strip()
        elif _OTHER_TITLE.search(line) is not None:
            memory = None
        elif memory is not None and (row := _ROW.search(line)) is not None:
            found[Read(memory, row["method"], row["lane"])] = None
            memory = None
    return list(found)
