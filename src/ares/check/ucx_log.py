"""The transport that UCX reads KV over, from the log of an instance that was started with ``UCX_PROTO_INFO=y``.

For each kind of transfer UCX prints a table (1.22: src/ucp/proto/proto_debug.c): the connection and the operation, in
one line or in two, then a row for each range of sizes with the method and the lane. NIXL pulls by `ucp_get`, so that
only those tables count, and of them the range without an upper end: KV blocks are large.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

VARIABLE = "UCX_PROTO_INFO"
# The name of a connection; one to the own process transfers nothing.
_CONNECTION = re.compile(r"(?P<self>self )?cfg#\d+$")
_READ = "remote memory read by ucp_get"
_LARGE = re.compile(r"\d\w*\.\.inf$")


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
    """Return the reads from other processes that a log names, each once, in the order of the log."""
    found: dict[Read, None] = {}
    other_process, memory = False, None
    for line in log.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) in (1, 2) and (connection := _CONNECTION.search(cells[0])) is not None:
            other_process, memory = connection["self"] is None, None
            cells = cells[1:]
        if len(cells) == 1:
            memory = _memory(cells[0]) if other_process else None
        elif len(cells) == 3 and memory is not None and _LARGE.match(cells[0]) is not None:
            found[Read(memory, cells[1], cells[2])] = None
    return list(found)


def _memory(operation: str) -> str | None:
    """Return from and into which memory a read goes; None where the operation is none."""
    if not operation.startswith(_READ):
        return None
    return operation[operation.find("into ") :] if "into " in operation else ""
