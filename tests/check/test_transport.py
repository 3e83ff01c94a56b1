"""What is said of the transport: what the log of an instance shows, and nothing that it does not."""

from pathlib import Path

import pytest

from ares.check import transport
from ares.check.rows import Outcome
from tests.check.test_configuration import found
from tests.check.test_ucx_log import get

CUDA = "into cuda/GPU0 from cuda/dev[0]"


@pytest.mark.parametrize(
    ("memory", "lane", "method", "devices", "outcome", "advice"),
    [
        (CUDA, "cuda_ipc/cuda", "zero-copy", "mlx5_0", Outcome.PASS, ""),
        (CUDA, "rc_mlx5/mlx5_0:1", "zero-copy", "mlx5_0", Outcome.PASS, ""),
        ("into host memory", "cma/memory", "zero-copy", "", Outcome.PASS, ""),
        ("into host memory", "tcp/eth0", "software emulation", "", Outcome.PASS, ""),
        ("into host memory", "tcp/eth0", "software emulation", "mlx5_0", Outcome.WARN, "UCX_NET_DEVICES"),
        (CUDA, "sysv/memory", "software emulation", "", Outcome.WARN, "UCX_CUDA_IPC_ENABLE_GET_ZCOPY"),
    ],
)
def test_the_transport_of_the_log(
    memory: str, lane: str, method: str, devices: str, outcome: Outcome, advice: str, tmp_path: Path
) -> None:
    log = tmp_path / "a.log"
    log.write_text(f"INFO starting\n{get(memory, ('0..inf', method, lane))}\n")
    (row,) = transport.rows([found("a", rdma_devices=devices)], {"a": log})
    assert row.outcome is outcome
    assert lane in row.value
    assert advice in row.advice


def test_without_a_log_the_transport_is_unknown_and_how_to_find_out_is_told(tmp_path: Path) -> None:
    log = tmp_path / "b.log"
    log.write_text("INFO starting\n")
    for row in transport.rows([found("a"), found("b")], {"b": log}):
        assert row.outcome is Outcome.NOT_RUN
        assert row.value.startswith("unknown")
        assert f"UCX_PROTO_INFO=y, and give its log: --log {row.check}=FILE" in row.advice


@pytest.mark.parametrize(
    ("allowed", "outcome"),
    [("tcp,shm,self", Outcome.WARN), ("rc,cuda_ipc", Outcome.NOT_RUN), ("all", Outcome.NOT_RUN), ("", Outcome.NOT_RUN)],
)
def test_a_variable_that_excludes_the_rdma_devices_is_named(allowed: str, outcome: Outcome) -> None:
    (row,) = transport.rows([found("a", rdma_devices="mlx5_0", ucx_tls=allowed)], {})
    assert row.outcome is outcome


def test_the_speed_is_that_of_the_instances_that_pulled() -> None:
    before = {name: {"nixl_bytes_transferred_sum": 0.0, "nixl_xfer_time_seconds_sum": 0.0} for name in ("a", "b")}
    after = before | {"b": {"nixl_bytes_transferred_sum": 2.0 * (1 << 30), "nixl_xfer_time_seconds_sum": 0.5}}
    (row,) = transport.speed([found("a"), found("b")], before, after)
    assert row.value.startswith("b 4.00 GiB/s")
    (none,) = transport.speed([found("a")], before, before)
    assert none.outcome is Outcome.NOT_RUN
