"""Which GPUs this process may use: what the machine has, and what the environment leaves of it."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ares.local_cluster.gpus import GpuError, Gpus

CUDA = "CUDA_VISIBLE_DEVICES"
HIP = "HIP_VISIBLE_DEVICES"
ROCR = "ROCR_VISIBLE_DEVICES"
_NVIDIA = "proc/driver/nvidia/gpus"
_AMD = "sys/class/kfd/kfd/topology/nodes"
_NVIDIA_SMI_TIMEOUT_S = 30.0
# `nvidia-smi -L`: a line for each GPU, and below it one for each of its MIG devices.
_GPU_LINE = re.compile(r"GPU (?P<index>\d+): .*\(UUID: (?P<uuid>GPU-[\w-]+)\)")
_MIG_LINE = re.compile(r"\s+MIG .*\(UUID: (?P<uuid>MIG-[\w/-]+)\)")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU of this machine.

    Attributes
    ----------
    index
        Its number, as the driver counts.
    uuid
        Its UUID; empty where it is not known.
    mig
        The UUIDs of its MIG devices: where there are any, CUDA uses these and not the GPU.
    """

    index: int
    uuid: str = ""
    mig: tuple[str, ...] = ()


def find(environment: Mapping[str, str], root: Path = Path("/")) -> Gpus:
    """Return the GPUs of this machine that the environment leaves visible.

    Parameters
    ----------
    root
        Where ``/proc`` and ``/sys`` are.

    Raises
    ------
    GpuError
        A variable names GPUs that do not exist, one of them twice, or none.
    """
    if devices := nvidia_devices(root):
        return nvidia(environment, devices)
    if count := _amd_count(root):
        return amd(environment, count)
    # A driver that is not listed in /proc: the variable alone says what there is.
    return nvidia(environment, ()) if environment.get(CUDA) else Gpus()


def nvidia_devices(root: Path = Path("/")) -> list[Device]:
    """Return NVIDIA's GPUs by ``nvidia-smi -L``; where it is missing, by the driver's own list, without UUIDs."""
    if command := shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(  # noqa: S603 - no user input
                [command, "-L"], capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S
            )
            return parse_list(done.stdout)
    return [Device(n) for n, _ in enumerate((root / _NVIDIA).glob("*"))]


def parse_list(text: str) -> list[Device]:
    """Return the GPUs in the output of ``nvidia-smi -L``."""
    devices: list[Device] = []
    for line in text.splitlines():
        if found := _GPU_LINE.match(line):
            devices.append(Device(int(found["index"]), found["uuid"]))
        elif devices and (found := _MIG_LINE.match(line)):
            last = devices[-1]
            devices[-1] = Device(last.index, last.uuid, (*last.mig, found["uuid"]))
    return devices


def nvidia(environment: Mapping[str, str], devices: Sequence[Device]) -> Gpus:
    """Return what ``CUDA_VISIBLE_DEVICES`` leaves of these GPUs; all of them where it is not set.

    It takes indices, UUIDs of GPUs and of MIG devices, and beginnings of UUIDs. CUDA ignores silently what comes after
    an entry that does not exist; here that is an error.
    """
    if (text := environment.get(CUDA)) is None:
        every = [name for device in devices for name in (device.mig or (str(device.index),))]
        return Gpus(tuple(every))
    names = _entries(CUDA, text)
    ids = tuple(_known(name, devices) for name in names) if devices else tuple(names)
    if len(set(ids)) < len(ids):
        raise GpuError(f"{CUDA}={text} names a GPU twice")
    return Gpus(ids, (CUDA,), CUDA)


def _known(name: str, devices: Sequence[Device]) -> str:
    if name.isdecimal():
        device = next((device for device in devices if device.index == int(name)), None)
        if device is not None and len(device.mig) > 1:
            raise GpuError(
                f"{CUDA} names GPU {name}, which is divided into MIG devices: name these ({', '.join(device.mig)})"
            )
        # CUDA takes the only MIG device for the GPU; by its UUID it is the same for `nvidia-smi` and for us.
        found = [] if device is None else [device.mig[0] if device.mig else str(device.index)]
    else:
        uuids = [uuid for device in devices for uuid in (device.mig or (device.uuid,))]
        found = [uuid for uuid in uuids if uuid and uuid.startswith(name)]
        if not any(uuids) or name.startswith("MIG-GPU-"):  # cannot be checked: no UUIDs, or an older driver's names
            found = [name]
    if len(found) != 1:
        what = "several GPUs" if found else "no GPU of this machine"
        listed = ", ".join(f"{device.index} {device.uuid}".strip() for device in devices)
        raise GpuError(f"{CUDA}: {name} is {what} ({listed})")
    return found[0]


def amd(environment: Mapping[str, str], count: int) -> Gpus:
    """Return what AMD's variables leave of so many GPUs.

    ``ROCR_VISIBLE_DEVICES`` applies first, and ``HIP_VISIBLE_DEVICES`` counts what it leaves; vLLM takes
    ``CUDA_VISIBLE_DEVICES`` for the latter and wants both equal where both are set (platforms/rocm.py, 0.32).
    """
    source = "/sys/class/kfd"
    if (text := environment.get(ROCR)) is not None:
        count, source = len(_entries(ROCR, text)), ROCR
    variables = tuple(name for name in (HIP, CUDA) if environment.get(name))
    texts = {environment[name] for name in variables}
    if len(texts) > 1:
        raise GpuError(f"{HIP} and {CUDA} differ: set one of them, or both to the same")
    if not texts:
        return Gpus(tuple(str(n) for n in range(count)), (HIP,), source)
    names = _entries(variables[0], texts.pop())
    for name in names:
        if name.isdecimal() and int(name) >= count:
            raise GpuError(f"{variables[0]}: there is no GPU {name}, but {count} ({source})")
    if len(set(names)) < len(names):
        raise GpuError(f"{variables[0]} names a GPU twice: {','.join(names)}")
    return Gpus(tuple(names), variables, variables[0])


def _entries(variable: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or "-1" in names:
        raise GpuError(f"{variable}={text} hides GPUs: unset it, or list the GPUs to use")
    return names


def _amd_count(root: Path) -> int:
    """Return the number of AMD's GPUs that this process may open: a node of the topology with a number is a GPU."""
    count = 0
    for file in (root / _AMD).glob("*/gpu_id"):
        with contextlib.suppress(OSError, ValueError):  # hidden from this container
            count += int(file.read_text()) != 0
    return count
