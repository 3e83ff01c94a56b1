"""What a run of a learning cluster is made of, and how it is cut into parts."""

import pytest

from ares.bench.live.client import Observed
from ares_dev.learning.run import Learned, figures, parts
from ares_dev.learning.traffic import Phase, arrivals

PHASES = [Phase("first", ["a", "b"], 60.0, 2.0, 0.7, 64), Phase("drift", ["c"], 30.0, 1.0, 1.0, 64)]


def sample(at_s: float, preemptions: int = 0, **versions: str) -> dict[str, object]:
    return {"at_s": at_s, "preemptions": preemptions, "running": 0, "versions": versions}


def test_arrivals_come_in_order_each_in_its_phase() -> None:
    planned = list(arrivals(PHASES, seed=3))
    times = [each.at_s for _, each in planned]
    assert times == sorted(times)
    assert all((phase.name == "first") == (each.at_s < 60) for phase, each in planned)
    assert {each.body["messages"][0]["content"] for phase, each in planned if phase.name == "drift"} == {"c"}
    assert len([phase for phase, _ in planned if phase.name == "first"]) == pytest.approx(120, rel=0.3)
    assert len({each.name for _, each in planned}) == len(planned)


def test_a_swap_counts_when_every_instance_has_made_it() -> None:
    learned = Learned(samples=[sample(5, a="", b=""), sample(10, a="v1", b=""), sample(15, a="v1", b="v1")])
    assert learned.swapped_at() == [(15, "v1")]
    assert parts(learned, PHASES) == [("first, curve", 0.0, 15), ("first, v1", 15, 60.0), ("drift, v1", 60.0, 90.0)]


def test_a_run_without_a_swap_has_its_phases() -> None:
    assert parts(Learned(samples=[sample(5, a="")]), PHASES) == [
        ("first, curve", 0.0, 60.0),
        ("drift, curve", 60.0, 90.0),
    ]


def test_figures_are_of_the_requests_that_arrived_then() -> None:
    def request(name: str, at_s: float, tpot_s: float, error: str | None = None) -> Observed:
        times = [at_s + 1 + n * tpot_s for n in range(11)]
        return Observed(name, at_s, [7] * 11, 3, times[0], times[-1], tpot_s, error, times)

    learned = Learned(
        requests=[
            ("first", request("a", 10, 0.1)),
            ("first", request("b", 20, 0.3)),
            ("first", request("c", 30, 0.1, "lost")),
            ("first", request("d", 70, 9.0)),
        ],
        samples=[sample(0, 2), sample(30, 5), sample(59, 8), sample(70, 90)],
    )
    found = figures(learned, 0.0, 60.0, slo_tpot_s=0.2)
    assert (found["requests"], found["failed"]) == (3, 1)
    assert found["tpot_ms"]["p50"] == pytest.approx(200)
    assert found["longest_gap_ms"]["max"] == pytest.approx(300)
    assert found["preemptions_per_minute"] == 6
    assert found["within_slo_per_minute"] == 1
