"""The transport that NIXL uses, and how fast KV came over it."""

from pathlib import Path
from typing import Any

from ares.bench.nixl_counters import BYTES, SECONDS
from ares.check import ucx_log
from ares.check.instances import Found
from ares.check.rows import Outcome, Row
from ares.check.ucx_log import Read, Transport

GROUP = "transport"
# An instance's log can be large; UCX prints its tables at the first transfers.
_LOG_BYTES = 64 << 20
_GIB = 1 << 30
# Names in UCX_TLS that allow RDMA.
_RDMA_NAMES = {"all", "ib", "rc", "rc_x", "rc_v", "rc_mlx5", "rc_verbs", "dc", "dc_x", "dc_mlx5", "ud", "ud_x", "ud_v"}


def rows(found: list[Found], logs: dict[str, Path]) -> list[Row]:
    """Return a row for each instance that pulls.

    Parameters
    ----------
    logs
        Logs of instances by their names.
    """
    pulling = [each for each in found if not each.mock and each.hello.role != "prefill"]
    return [_row(each, logs.get(each.name)) for each in pulling] or [
        Row(GROUP, "UCX", Outcome.NOT_RUN, "no instance pulls KV by UCX")
    ]


def speed(found: list[Found], before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> list[Row]:
    """Return how fast KV came, by the counters of each instance (`bench.nixl_counters`) before and after."""
    rates = {}
    for each in found:
        risen = {name: after[each.name][name] - before[each.name][name] for name in (BYTES, SECONDS)}
        if risen[SECONDS] > 0:
            rates[each.name] = risen[BYTES] / risen[SECONDS] / _GIB
    if not rates:
        return [Row(GROUP, "speed", Outcome.NOT_RUN, "no instance counts what NIXL has transferred")]
    value = ", ".join(f"{name} {rate:.2f} GiB/s" for name, rate in rates.items())
    return [Row(GROUP, "speed", Outcome.PASS, f"{value} (small transfers)", figures={"gib_per_s": rates})]


def _row(found: Found, log: Path | None) -> Row:
    configuration = found.hello.configuration
    devices, allowed = configuration.get("rdma_devices", ""), configuration.get("ucx_tls", "")
    figures: dict[str, Any] = {"rdma_devices": devices, "ucx_tls": allowed}
    excluded = devices and allowed and not allowed.startswith("^") and not _RDMA_NAMES & set(allowed.split(","))
    reads = ucx_log.reads(_text(log)) if log is not None else []
    if not reads:
        if excluded:
            value = f"unknown; UCX_TLS={allowed} excludes RDMA on a host with {devices}"
            return Row(GROUP, found.name, Outcome.WARN, value, "start it without UCX_TLS, or add rc", figures)
        advice = f"start it with {ucx_log.VARIABLE}=y, and give its log: --log {found.name}=FILE"
        value = "unknown: its log names no read by UCX" if log is not None else "unknown: only its log can tell"
        return Row(GROUP, found.name, Outcome.NOT_RUN, value, advice, figures)
    value = "; ".join(dict.fromkeys(f"{read.transport.value} ({read.lanes}, {read.method})" for read in reads))
    figures |= {"reads": [{"memory": r.memory, "method": r.method, "lanes": r.lanes} for r in reads]}
    if any(read.transport is Transport.TCP for read in reads) and devices:
        advice = "check UCX_TLS and UCX_NET_DEVICES, and that the device is up (ibv_devinfo)"
        return Row(GROUP, found.name, Outcome.WARN, f"{value}, on a host with {devices}", advice, figures)
    if advice := next(filter(None, map(_slow, reads)), ""):
        return Row(GROUP, found.name, Outcome.WARN, value, advice, figures)
    return Row(GROUP, found.name, Outcome.PASS, value, figures=figures)


def _slow(read: Read) -> str:
    """Return what to do about a read of GPU memory that goes through a processor; else nothing."""
    if "cuda" not in read.memory or not (read.emulated or read.transport in (Transport.TCP, Transport.SHARED_MEMORY)):
        return ""
    return (
        "GPU memory is read through the processors of both sides; within a host without NVLink, "
        "UCX_CUDA_IPC_ENABLE_GET_ZCOPY=on lets cuda_ipc read; between hosts, see UCX_TLS and UCX_NET_DEVICES"
    )


def _text(log: Path) -> str:
    with log.open("rb") as file:
        return file.read(_LOG_BYTES).decode(errors="replace")
