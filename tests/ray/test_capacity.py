import pytest

from ares.ray.capacity import CapacityError, Need, Node, check

BIG, SMALL = Node("10.0.0.1", 64, 8), Node("10.0.0.2", 8, 0)


@pytest.mark.parametrize(
    "needs",
    [
        [Need("decode instances", 4, 1, 2)],
        [Need("decode instances", 2, 1, 0, per_node=1)],
        [Need("decode instances", 3, 1, 2), Need("prefill instances", 2, 30, 1), Need("gateways", 8, 1, 0)],
        [Need("decode instances", 16, 1, 0.5)],
    ],
)
def test_what_fits_is_taken(needs: list[Need]) -> None:
    check(needs, [BIG, SMALL])


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (
            [Need("decode instances", 3, 1, 3)],
            r"decode instances: 3 with 1 CPUs and 3 GPUs each do not fit, only 2 do",
        ),
        ([Need("decode instances", 1, 1, 16)], r"only 0 do: .*10.0.0.1: 64 CPUs and 8 GPUs, 10.0.0.2: 8 CPUs and 0"),
        ([Need("decode instances", 3, 1, 0, 1)], r"at most 1 on a node do not fit, only 2 do"),
        (
            [Need("decode instances", 3, 1, 2), Need("prefill instances", 3, 1, 1)],
            r"decode instances and prefill instances need 9 GPUs together, .* has 8",
        ),
        ([Need("gateways", 1, 1, 0), Need("decode instances", 72, 1, 0)], r"need 73 CPUs together, .* has 72"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_there_is(needs: list[Need], said: str) -> None:
    with pytest.raises(CapacityError, match=said):
        check(needs, [BIG, SMALL])
