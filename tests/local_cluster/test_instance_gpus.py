"""What instances of `ares up` are started with on a machine with GPUs: their own GPUs, and flags by role."""

import dataclasses
from pathlib import Path

import pytest

from ares.engine.defaults import gpus_per_instance, limits_memory
from ares.local_cluster import cluster as local
from ares.local_cluster.cluster import ClusterSettings, ManagedProcess, running, with_gpus
from ares.local_cluster.gpus import GpuError
from tests.local_cluster.test_cluster import Stage, quiet, stage  # noqa: F401 - a fixture
from tests.local_cluster.test_gpu_discovery import fake_nvidia_smi

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "is_cpu_build", lambda: False)
    fake_nvidia_smi(tmp_path, "".join(f"GPU {n}: NVIDIA H200 (UUID: GPU-{n}a)\n" for n in range(4)))


def visible(process: ManagedProcess) -> str | None:
    return (process.environment or {}).get("CUDA_VISIBLE_DEVICES")


@pytest.mark.usefixtures("four_gpus")
def test_each_instance_sees_its_own_gpus_and_the_flags_of_its_role(stage: Stage) -> None:  # noqa: F811
    settings = dataclasses.replace(
        stage.settings,
        decode=None,
        vllm_flags=("--seed", "1"),
        prefill_flags=("-tp", "2"),
        decode_flags=("--max-num-seqs", "64"),
    )
    console = quiet()
    with running(settings, console) as cluster:
        assert {p.name: visible(p) for p in cluster.processes} == {
            "prefill-0": "0,1",
            "decode-0": "2",
            "decode-1": "3",
            "gateway": None,
        }
        ends = {p.name: p.command[p.command.index("--") + 1 :] for p in cluster.workers}
        assert ends["prefill-0"] == ["--seed", "1", "-tp", "2"]
        assert ends["decode-1"] == ["--seed", "1", "--max-num-seqs", "64"]
    assert "prefill-0: GPUs 0,1 (tensor parallel)" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("four_gpus")
def test_a_restarted_instance_has_the_same_gpus(stage: Stage) -> None:  # noqa: F811
    with running(dataclasses.replace(stage.settings, decode=1), quiet()) as cluster:
        before = visible(cluster.workers[1])
        cluster.workers[1].popen.kill()
        cluster.workers[1].popen.wait()
        cluster.restart(cluster.workers[1])
        environment = Path(f"/proc/{cluster.workers[1].popen.pid}/environ").read_bytes().split(b"\0")
        assert f"CUDA_VISIBLE_DEVICES={before}".encode() in environment


@pytest.mark.usefixtures("four_gpus")
def test_too_few_are_refused_before_anything_starts(stage: Stage) -> None:  # noqa: F811
    with (
        pytest.raises(GpuError, match="5 GPUs are needed"),
        running(dataclasses.replace(stage.settings, decode=4), quiet()),
    ):
        pytest.fail("it must not start")
    assert stage.started() == {}


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("flags", "prefill_flags", "accepted"),
    [
        ((), (), False),
        (("--gpu-memory-utilization", "0.4"), (), True),
        (("--kv-cache-memory-bytes=1G",), (), True),
        ((), ("--gpu-memory-utilization", "0.4"), False),
    ],
)
def test_instances_that_share_a_gpu_need_a_limit(
    flags: tuple[str, ...], prefill_flags: tuple[str, ...], *, accepted: bool
) -> None:
    settings = ClusterSettings("m", decode=5, share_gpus=True, vllm_flags=flags, prefill_flags=prefill_flags)
    if not accepted:
        with pytest.raises(GpuError, match="--gpu-memory-utilization"):
            with_gpus(settings, {}, quiet())
        return
    placed = with_gpus(settings, {}, quiet())
    assert placed.gpus is not None
    assert placed.gpus.decode_gpus == (("1",), ("2",), ("3",), ("0",), ("1",))


def test_mock_engines_and_cpu_builds_need_none() -> None:
    settings = with_gpus(ClusterSettings("m", decode=None, simulate="p"), {"CUDA_VISIBLE_DEVICES": "0"}, quiet())
    assert settings.decode == 2
    assert settings.gpus is not None
    assert settings.gpus.decode_gpus == ()


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ([], 1),
        (["--max-model-len", "4096"], 1),
        (["--tensor-parallel-size", "2"], 2),
        (["--tensor-parallel-size=4", "--x"], 4),
        (["--tensor_parallel_size", "4"], 4),
        (["-tp", "8", "--enforce-eager"], 8),
        (["-tp", "2", "-tp", "4"], 4),
        (["-tp", "2", "-pp", "3"], 6),
        (["-tp", "many"], 1),
        (["-tp", "0"], 1),
        (["-tp", "-2"], 1),
        (["-tp"], 1),
    ],
)
def test_gpus_of_an_instance(flags: list[str], count: int) -> None:
    assert gpus_per_instance(flags) == count


def test_limits_of_memory() -> None:
    assert limits_memory(["--gpu_memory_utilization=0.3"])
    assert not limits_memory(["--max-model-len", "4096"])
