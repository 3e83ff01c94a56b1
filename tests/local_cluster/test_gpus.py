"""Which GPUs each instance gets: visible GPUs and a request in, an assignment or a refusal out."""

import pytest

from ares.local_cluster.gpus import Assignment, GpuError, GpuRequest, Gpus, assign

MIG = tuple(f"MIG-{n}" for n in range(3))


def gpus(count: int) -> Gpus:
    return Gpus(tuple(str(n) for n in range(count)))


def flat(assignment: Assignment) -> tuple[str, str]:
    return tuple(" ".join(",".join(ids) for ids in role) for role in (assignment.prefill_gpus, assignment.decode_gpus))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("visible", "request_", "prefill", "decode"),
    [
        # Every GPU is used where the number of decode instances is left open.
        (gpus(2), GpuRequest(), "0", "1"),
        (gpus(3), GpuRequest(), "0", "1 2"),
        (gpus(8), GpuRequest(), "0", "1 2 3 4 5 6 7"),
        (gpus(8), GpuRequest(prefill=2), "0 1", "2 3 4 5 6 7"),
        (gpus(2), GpuRequest(prefill=0), "", "0 1"),
        (gpus(1), GpuRequest(prefill=0), "", "0"),
        # Tensor parallel, also by role.
        (gpus(8), GpuRequest(gpus_per_prefill=2, gpus_per_decode=2), "0,1", "2,3 4,5 6,7"),
        (gpus(8), GpuRequest(gpus_per_decode=2), "0", "1,2 3,4 5,6"),
        (gpus(8), GpuRequest(gpus_per_prefill=4), "0,1,2,3", "4 5 6 7"),
        (gpus(4), GpuRequest(prefill=0, gpus_per_prefill=16, gpus_per_decode=2), "", "0,1 2,3"),
        # A number that is asked for is kept.
        (gpus(8), GpuRequest(decode=2), "0", "1 2"),
        (gpus(3), GpuRequest(decode=2), "0", "1 2"),
        # Sharing, in turn, only where there are too few.
        (gpus(1), GpuRequest(share=True), "0", "0 0"),
        (gpus(2), GpuRequest(decode=2, share=True), "0", "1 0"),
        (gpus(2), GpuRequest(decode=2, gpus_per_decode=2, share=True), "0", "1,0 1,0"),
        (gpus(4), GpuRequest(decode=2, share=True), "0", "1 2"),
        # As they are named.
        (Gpus(("5", "2")), GpuRequest(), "5", "2"),
        (Gpus(("GPU-a", "GPU-b", "GPU-c")), GpuRequest(), "GPU-a", "GPU-b GPU-c"),
        (Gpus(MIG), GpuRequest(), "MIG-0", "MIG-1 MIG-2"),
    ],
)
def test_assignments(visible: Gpus, request_: GpuRequest, prefill: str, decode: str) -> None:
    assigned = assign(visible, request_)
    assert flat(assigned) == (prefill, decode)
    assert assigned.decode == len(decode.split())
    assert len(assigned.prefill_gpus) == request_.prefill


@pytest.mark.parametrize(("asked", "decode"), [(None, 2), (5, 5)])
def test_without_gpus_nothing_is_assigned(asked: int | None, decode: int) -> None:
    assert assign(Gpus(), GpuRequest(decode=asked, gpus_per_decode=4)) == Assignment(decode)


@pytest.mark.parametrize(
    ("visible", "request_", "parts"),
    [
        (gpus(1), GpuRequest(), ["2 GPUs are needed (1 prefill x 1 + 1 decode x 1)", "1 is visible", "--share-gpus"]),
        (gpus(1), GpuRequest(), ["--prefill 0 --decode 1"]),
        (
            gpus(4),
            GpuRequest(decode=2, gpus_per_prefill=2, gpus_per_decode=2),
            ["6 GPUs are needed (1 prefill x 2 + 2 decode x 2)", "4 are visible (nvidia-smi: 0,1,2,3)", "--decode 2"],
        ),
        (gpus(2), GpuRequest(prefill=0, decode=3), ["3 GPUs are needed (3 decode x 1)", "fewer instances (--prefill"]),
        (gpus(2), GpuRequest(gpus_per_decode=4), ["a decode instance needs 4 GPUs", "--tensor-parallel-size"]),
        (gpus(2), GpuRequest(gpus_per_prefill=4, share=True), ["a prefill instance needs 4 GPUs"]),
        (Gpus(MIG), GpuRequest(gpus_per_decode=2), ["MIG devices", "leave out --tensor-parallel-size"]),
        (Gpus(), GpuRequest(share=True), ["--share-gpus: no GPU was found"]),
    ],
)
def test_refusals(visible: Gpus, request_: GpuRequest, parts: list[str]) -> None:
    with pytest.raises(GpuError) as refused:
        assign(visible, request_)
    for part in parts:
        assert part in str(refused.value)


def test_the_reasons_name_every_instance_and_what_stays_idle() -> None:
    seen = Gpus(("4", "5", "6", "7"), source="CUDA_VISIBLE_DEVICES")
    lines = assign(seen, GpuRequest(gpus_per_decode=2)).reasons
    assert lines[:3] == (
        "GPUs: 4 are visible (CUDA_VISIBLE_DEVICES: 4,5,6,7)",
        "prefill-0: GPU 4",
        "decode-0: GPUs 5,6 (tensor parallel)",
    )
    assert any("--prefill 0" in line for line in lines)
    assert lines[-1].startswith("idle: 7,")
    shared = assign(gpus(2), GpuRequest(decode=2, share=True)).reasons
    assert shared[1:] == (
        "prefill-0: GPU 0, shared with other instances",
        "decode-0: GPU 1",
        "decode-1: GPU 0, shared with other instances",
    )


def test_instances_never_share_unless_asked() -> None:
    for count in range(1, 10):
        for prefill in range(3):
            for size in (1, 2, 3):
                try:
                    given = assign(gpus(count), GpuRequest(prefill, None, 1, size))
                except GpuError:
                    assert count < prefill + size
                    continue
                used = [name for share in (*given.prefill_gpus, *given.decode_gpus) for name in share]
                assert len(used) == len(set(used))
                assert count - len(used) < size
