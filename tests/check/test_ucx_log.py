"""Which transport UCX reads over, by the tables that it prints (UCX_PROTO_INFO=y)."""

import pytest

from ares.check.ucx_log import Read, Transport, reads

LINE = "[1732838400.{n:06}] [host:4711:0]   {text}"


def log(title: str, *rows: tuple[str, str, str]) -> str:
    """A table as UCX prints it, each line with its time and process."""
    border = "+----------------------------------+----------------------------+----------------------+"
    lines = [border, f"| ucp_context_0 intra-node cfg#1 | {title} |", border]
    lines += [f"| {size:>30} | {method:<26} | {lane:<20} |" for size, method, lane in rows]
    return "\n".join(LINE.format(n=n, text=text) for n, text in enumerate([*lines, border]))


def get(memory: str, *rows: tuple[str, str, str]) -> str:
    return log(f"remote memory read by ucp_get*(multi) {memory}", *rows)


@pytest.mark.parametrize(
    ("rows", "transport", "emulated"),
    [
        ([("0..inf", "zero-copy", "cuda_ipc/cuda")], Transport.CUDA_IPC, False),
        ([("0", "copy-out", "rc_mlx5/mlx5_0:1"), ("1..inf", "zero-copy", "rc_mlx5/mlx5_0:1")], Transport.RDMA, False),
        (
            [("1..64", "software emulation", "cma/memory"), ("65..inf", "zero-copy", "cma/memory")],
            "shared memory",
            False,
        ),
        ([("0..inf", "software emulation", "tcp/eth0")], Transport.TCP, True),
        ([("4K..inf", "zero-copy", "dc_mlx5/mlx5_1:1 50% on path0")], Transport.RDMA, False),
        ([("0..inf", "zero-copy", "unheard_of/device")], Transport.OTHER, False),
    ],
)
def test_the_lane_of_large_reads_decides(
    rows: list[tuple[str, str, str]], transport: Transport, emulated: bool
) -> None:
    (found,) = reads(get("into cuda/GPU0 from cuda/dev[0]", *rows))
    assert (found.transport, found.emulated) == (transport, emulated)
    assert found.memory == "into cuda/GPU0 from cuda/dev[0]"


def test_other_tables_and_what_instances_log_do_not_count() -> None:
    other = log("active message by ucp_am_send* from host memory", ("0..inf", "zero-copy", "tcp/eth0"))
    write = log("remote memory write by ucp_put* from host memory to host", ("0..inf", "zero-copy", "tcp/eth0"))
    text = "\n".join(
        [other, "INFO: | 1..inf | pressure | of things |", get("into host memory", ("0..inf", "a", "cma/memory"))]
    )
    assert reads(f"{write}\n{text}\n{text}") == [Read("into host memory", "a", "cma/memory")]
    assert reads(other) == reads("") == []


# As NIXL 1.5.1 prints it on a host without GPUs, with the names of other connections shortened.
TWO_LINES = """\
[1795912310.868281] [vm:9144 :0]   +-----------+-------------+--------------------------------+
[1795912310.868281] [vm:9144 :0]   | c2cb6a8c-3be6-4d39-bc46-5fa3abb self cfg#0               |
[1795912310.868281] [vm:9144 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1795912310.868281] [vm:9144 :0]   +-----------+-------------+--------------------------------+
[1795912310.868281] [vm:9144 :0]   |   Range   | Description |             Config             |
[1795912310.868281] [vm:9144 :0]   +-----------+-------------+--------------------------------+
[1795912310.868281] [vm:9144 :0]   |   0..5804 | short       | self/memory                    |
[1795912310.868281] [vm:9144 :0]   | 5805..inf | zero-copy   | self/memory                    |
[1795912310.868281] [vm:9144 :0]   +-----------+-------------+--------------------------------+
(EngineCore pid=9144) INFO 11-29 00:32:36 [base_worker.py:1093] NIXL compatibility check passed
[1795912357.602038] [vm:9144 :0]   +--------+-------------+-------------------------------------------+
[1795912357.602038] [vm:9144 :0]   | c2cb6a8c-3be6-4d39-bc46-5fa3abb intra-node cfg#1                 |
[1795912357.602038] [vm:9144 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1795912357.602038] [vm:9144 :0]   +--------+-------------+-------------------------------------------+
[1795912357.602038] [vm:9144 :0]   | Range  | Description |                  Config                   |
[1795912357.602038] [vm:9144 :0]   +--------+-------------+-------------------------------------------+
[1795912357.602038] [vm:9144 :0]   | 0..inf | zero-copy   | cma/memory                                |
[1795912357.602038] [vm:9144 :0]   +--------+-------------+-------------------------------------------+
[1795912357.602518] [vm:9144 :0]   +-----------+--------------------+---------------------+
[1795912357.602518] [vm:9144 :0]   | c2cb6a8c-3be6-4d39-bc46-5fa3abb intra-node cfg#1     |
[1795912357.602518] [vm:9144 :0]   | active message by ucp_am_send*(egr) from host memory |
[1795912357.602518] [vm:9144 :0]   +-----------+--------------------+---------------------+
[1795912357.602518] [vm:9144 :0]   |   Range   |    Description     |       Config        |
[1795912357.602518] [vm:9144 :0]   +-----------+--------------------+---------------------+
[1795912357.602518] [vm:9144 :0]   | 8249..inf | multi-frag copy-in | sysv/memory         |
[1795912357.602518] [vm:9144 :0]   +-----------+--------------------+---------------------+
"""


def test_connection_and_operation_in_two_lines_and_reads_of_the_own_process() -> None:
    assert reads(TWO_LINES) == [Read("into host memory from host", "zero-copy", "cma/memory")]
