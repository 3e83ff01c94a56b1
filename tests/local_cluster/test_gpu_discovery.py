"""Which GPUs are visible: the list of a fake `nvidia-smi`, and the variables of CUDA and of AMD."""

import os
from pathlib import Path

import pytest

from ares.local_cluster import gpu_discovery
from ares.local_cluster.gpu_discovery import Device
from ares.local_cluster.gpus import GpuError, Gpus

LIST = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-aaaa-bbbb-cccc-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 3g.20gb     Device  1: (UUID: MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5c1111-aaaa-bbbb-cccc-000000000001)
"""
FIRST, SECOND = "GPU-5d5ba0d6-aaaa-bbbb-cccc-000000000000", "GPU-5d5c1111-aaaa-bbbb-cccc-000000000001"
MIG = ("MIG-c7384736-a75d-5afc-978f-d2f1294409fd", "MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d")
WHOLE = [Device(0, FIRST), Device(1, SECOND)]
DIVIDED = [Device(0, FIRST, MIG), Device(1, SECOND)]
WITHOUT_UUIDS = [Device(0), Device(1), Device(2)]


def test_the_list_of_nvidia_smi() -> None:
    assert gpu_discovery.parse_list(LIST) == DIVIDED
    assert gpu_discovery.parse_list("No devices were found\n") == []


@pytest.mark.parametrize(
    ("devices", "variable", "ids"),
    [
        (WHOLE, None, ("0", "1")),
        (WHOLE, "1", ("1",)),
        (WHOLE, "1,0", ("1", "0")),
        (WHOLE, " 1 , 0 ", ("1", "0")),
        (WHOLE, SECOND, (SECOND,)),
        (WHOLE, f"GPU-5d5c,{FIRST}", (SECOND, FIRST)),
        (DIVIDED, None, (*MIG, "1")),
        (DIVIDED, MIG[1], (MIG[1],)),
        (DIVIDED, "MIG-c7,1", (MIG[0], "1")),
        (WHOLE, "MIG-GPU-5d5ba0d6/1/0", ("MIG-GPU-5d5ba0d6/1/0",)),
        (WITHOUT_UUIDS, None, ("0", "1", "2")),
        (WITHOUT_UUIDS, f"{FIRST},{SECOND}", (FIRST, SECOND)),
        ([], "3,4", ("3", "4")),
    ],
)
def test_cuda_visible_devices(devices: list[Device], variable: str | None, ids: tuple[str, ...]) -> None:
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    found = gpu_discovery.nvidia(environment, devices)
    source = "nvidia-smi" if variable is None else "CUDA_VISIBLE_DEVICES"
    assert found == Gpus(ids, ("CUDA_VISIBLE_DEVICES",), source)


@pytest.mark.parametrize(
    ("devices", "variable", "why"),
    [
        (WHOLE, "", "hides GPUs: unset it"),
        (WHOLE, "-1", "hides GPUs"),
        (WHOLE, "0,-1", "hides GPUs"),
        (WHOLE, "2", "2 is no GPU of this machine"),
        (WHOLE, "GPU-ffff", "GPU-ffff is no GPU"),
        (WHOLE, "GPU-5d5", "GPU-5d5 is several GPUs"),
        (WHOLE, "0,0", "twice"),
        (WHOLE, f"{FIRST},GPU-5d5ba", "twice"),
        (WHOLE, "all", "all is no GPU"),
        (DIVIDED, "0", "divided into MIG devices: name these"),
    ],
)
def test_what_cuda_would_ignore_is_refused(devices: list[Device], variable: str, why: str) -> None:
    with pytest.raises(GpuError, match=why):
        gpu_discovery.nvidia({"CUDA_VISIBLE_DEVICES": variable}, devices)


@pytest.mark.parametrize(
    ("environment", "ids", "variables", "source"),
    [
        ({}, "0,1,2,3", ("HIP_VISIBLE_DEVICES",), "/sys/class/kfd"),
        ({"HIP_VISIBLE_DEVICES": "2,1"}, "2,1", ("HIP_VISIBLE_DEVICES",), "HIP_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "3", ("CUDA_VISIBLE_DEVICES",), "CUDA_VISIBLE_DEVICES"),
        (
            {"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"},
            "0,1",
            ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
            "HIP_VISIBLE_DEVICES",
        ),
        # Its entries are counted anew by HIP.
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, "0,1", ("HIP_VISIBLE_DEVICES",), "ROCR_VISIBLE_DEVICES"),
        (
            {"ROCR_VISIBLE_DEVICES": "1,2,3", "HIP_VISIBLE_DEVICES": "2"},
            "2",
            ("HIP_VISIBLE_DEVICES",),
            "HIP_VISIBLE_DEVICES",
        ),
    ],
)
def test_amd(environment: dict[str, str], ids: str, variables: tuple[str, ...], source: str) -> None:
    assert gpu_discovery.amd(environment, 4) == Gpus(tuple(ids.split(",")), variables, source)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, "differ"),
        ({"HIP_VISIBLE_DEVICES": "4"}, "there is no GPU 4"),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, "there is no GPU 1, but 1"),
        ({"HIP_VISIBLE_DEVICES": "1,1"}, "twice"),
        ({"ROCR_VISIBLE_DEVICES": ""}, "hides GPUs"),
    ],
)
def test_amd_refusals(environment: dict[str, str], why: str) -> None:
    with pytest.raises(GpuError, match=why):
        gpu_discovery.amd(environment, 4)


def fake_nvidia_smi(folder: Path, text: str, status: int = 0) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] || exit 9\ncat <<'END'\n{text}END\nexit {status}\n")
    script.chmod(0o755)


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake_nvidia_smi(tmp_path, LIST)
    assert gpu_discovery.find({}, tmp_path).ids == (*MIG, "1")
    assert gpu_discovery.find({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path).ids == ("1",)
    fake_nvidia_smi(tmp_path, "NVIDIA-SMI has failed\n", 9)
    assert gpu_discovery.find({}, tmp_path) == Gpus()
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / bus).mkdir(parents=True)
    assert gpu_discovery.find({}, tmp_path).ids == ("0", "1")


def test_amd_gpus_are_nodes_with_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for node, number in enumerate(["0", "51022", "34067"]):  # the first is a CPU
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "gpu_id").write_text(f"{number}\n")
    assert gpu_discovery.find({}, tmp_path) == Gpus(("0", "1"), ("HIP_VISIBLE_DEVICES",), "/sys/class/kfd")
    assert gpu_discovery.find({"HIP_VISIBLE_DEVICES": "1"}, tmp_path).ids == ("1",)


def test_a_machine_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_discovery.find({}, tmp_path) == Gpus()
    assert gpu_discovery.find({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == Gpus()
