"""Admission by forecast: order, room, suspension, resumption, and the share of the oldest."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ares.policy import AdmissionSettings, Cluster, SuspendSettings
from ares.policy.admission import AdmissionDecision, Candidates, Forecast, ForecastSettings, Progress

SUSPENSION = SuspendSettings(
    ttft_s=2.0, after_s=0.5, least_slack_s=5.0, least_gap_s=5.0, urgent_s=2.0, longest_s=100.0, longest_missed_s=50.0
)
EXACTLY = AdmissionSettings(deviations=0.0, headroom=0.0)


def forecasting(
    admission: AdmissionSettings, suspension: SuspendSettings | None, order: str = "shortest_memory_time"
) -> Forecast:
    """The policy with the settings of its two halves."""
    given = asdict(admission) | asdict(suspension or SuspendSettings())
    known = {name: value for name, value in given.items() if name not in ("ttft_s", "tpot_s")}
    return Forecast(ForecastSettings(order=order, suspends=suspension is not None, **known))


def progress(count: int, **changes: Any) -> Progress:
    usual = {
        "generated": np.zeros(count, np.int64),
        "age_s": np.zeros(count),
        "elapsed_s": np.zeros(count),
        "ttft_s": np.full(count, 2.0),
        "tpot_s": np.full(count, 0.1),
        "gap_s": np.full(count, np.inf),
        "longest_gap_s": np.zeros(count),
        "rank": np.zeros(count, np.int64),
    }
    if "elapsed_s" in changes:  # a first token at once, where nothing else is said
        usual["age_s"] = np.asarray(changes["elapsed_s"])
    return Progress(**(usual | {name: np.asarray(value) for name, value in changes.items()}))


def running(rows: list[tuple[int, int, float]], instances: int = 1, capacity: int = 1000, **changes: Any) -> Cluster:
    """Rows of (instance, resident, remaining); a step at full memory takes 20 ms."""
    left = np.array([[remaining] * 3 for _, _, remaining in rows], float).reshape(len(rows), 3)
    cluster = Cluster(
        instances=tuple(f"decode-{n}" for n in range(instances)),
        capacity_tokens=np.full(instances, capacity, np.int64),
        promised_tokens=np.zeros(instances, np.int64),
        open=np.ones(instances, np.bool_),
        requests=tuple(f"row-{n}" for n in range(len(rows))),
        location=np.array([where for where, _, _ in rows], np.int64),
        resident_tokens=np.array([resident for _, resident, _ in rows], np.int64),
        movable=np.ones(len(rows), np.bool_),
        remaining_tokens=left,
        step_base_s=np.full(instances, 0.01),
        step_request_s=np.zeros(instances),
        step_token_s=np.full(instances, 0.01 / capacity),
    )
    return replace(cluster, **changes)


def waiting(tokens: list[int], remaining: list[float], waited: list[float] | None = None, **changes: Any) -> Candidates:
    count = len(tokens)
    usual: dict[str, Any] = {
        "requests": tuple(f"new-{n}" for n in range(count)),
        "tokens": np.array(tokens, np.int64),
        "remaining_tokens": np.array([[value] * 3 for value in remaining], float),
        "rank": np.zeros(count, np.int64),
        "waited_s": np.array(waited if waited is not None else [0.1] * count),
        "suspended": np.zeros(count, np.bool_),
        "progress": progress(count),
    }
    return Candidates(**(usual | changes))


def decide(
    cluster: Cluster,
    candidates: Candidates,
    stand: Progress | None = None,
    admission: AdmissionSettings = EXACTLY,
    suspension: SuspendSettings | None = SUSPENSION,
) -> list[AdmissionDecision]:
    policy = forecasting(admission, suspension)
    return policy.decide(cluster, candidates, stand or progress(len(cluster.location)))


def names(entries: list[AdmissionDecision]) -> list[tuple[str, int, int]]:
    return [(entry.kind, entry.index, entry.instance) for entry in entries]


def test_the_smallest_memory_time_first_until_the_next_does_not_fit() -> None:
    cluster = running([(0, 100, 50)])
    entries = decide(cluster, waiting([300, 100, 500], [300, 100, 400]))
    # 100 and 300 peak at 100 + 200 + 400 or less, and 500 more would not fit.
    assert names(entries) == [("admit", 1, 0), ("admit", 0, 0)]
    assert "expected peak" in entries[0].reason


def test_a_class_goes_before_a_smaller_request() -> None:
    cluster = running([(0, 600, 500)])
    candidates = waiting([100, 90], [100, 100])
    assert names(decide(cluster, candidates))[0][1] == 1
    assert names(decide(cluster, replace(candidates, rank=np.array([0, 1]))))[0][1] == 0


def test_an_empty_instance_takes_what_never_fits() -> None:
    assert names(decide(running([]), waiting([5000], [5000]))) == [("admit", 0, 0)]


def test_nobody_enters_a_closed_instance() -> None:
    cluster = running([(0, 10, 10), (1, 900, 90)], instances=2, open=np.array([False, True]))
    assert decide(cluster, waiting([200], [200])) == []
    assert decide(replace(cluster, open=np.array([False, False])), waiting([2], [2])) == []


def test_one_that_is_excluded_goes_elsewhere_or_lets_the_others_pass() -> None:
    candidates = waiting([200, 300], [100, 100], excluded=np.array([[False, True], [False, False]]))
    full = running([(0, 900, 500)], instances=2)
    assert names(decide(full, candidates, suspension=None)) == [("admit", 1, 1)]
    emptier = running([(1, 100, 50)], instances=2)
    assert names(decide(emptier, candidates, suspension=None))[0] == ("admit", 0, 0)


def test_turns_go_to_where_they_are_cached_and_no_herd_forms() -> None:
    cluster = running([(0, 300, 500), (1, 250, 500)], instances=2, capacity=10_000)
    cached = np.array([[400, 0]] * 8)
    turns = waiting([500] * 8, [10] * 8, cached_tokens=cached)
    weighing = AdmissionSettings(deviations=0.0, headroom=0.0, cached_weight=1.0)
    chosen = [entry.instance for entry in decide(cluster, turns, admission=weighing, suspension=None)]
    assert chosen[0] == 0, "50 tokens fuller, and 400 of it are there"
    assert sorted(chosen) == [0] * 4 + [1] * 4, "what has entered counts"
    alone = [entry.instance for entry in decide(cluster, turns, suspension=None)]
    assert alone[0] == 1


def test_a_suspended_one_resumes_where_its_warm_copy_is() -> None:
    """What is not cached there would be computed again, whatever weight a new request's prompt has."""
    cluster = running([(0, 300, 500), (1, 250, 500)], instances=2, capacity=10_000)
    cached = np.array([[400, 0], [400, 0]])
    both = waiting([500] * 2, [10] * 2, cached_tokens=cached, suspended=np.array([False, True]))
    entered = {index: instance for _, index, instance in names(decide(cluster, both, suspension=None))}
    assert entered[1] == 0
    alone = waiting([500], [10], cached_tokens=cached[:1])
    assert names(decide(cluster, alone, suspension=None)) == [("admit", 0, 1)]


@given(
    loads=st.lists(st.integers(1, 900), min_size=2, max_size=5),
    cached=st.lists(st.integers(0, 200), min_size=5, max_size=5),
    weight=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_the_price_of_what_is_cached_is_bounded(loads: list[int], cached: list[int], weight: float) -> None:
    """A turn enters where it fits, and nowhere that is fuller by more tokens than it has cached there, times weight."""
    count = len(loads)
    cluster = running([(n, load, 1000) for n, load in enumerate(loads)], instances=count, capacity=2000)
    turn = waiting([200], [10], cached_tokens=np.array([cached[:count]]))
    weighing = AdmissionSettings(deviations=0.0, headroom=0.0, cached_weight=weight)
    entries = decide(cluster, turn, admission=weighing, suspension=None)
    plain = decide(cluster, turn, suspension=None)
    assert len(entries) == len(plain)
    if entries:
        chosen, least = entries[0].instance, plain[0].instance
        assert loads[chosen] - loads[least] <= weight * cached[chosen] + 1
        assert cached[chosen] >= cached[least] or chosen == least


def test_room_is_not_made_where_the_candidate_is_excluded() -> None:
    cluster = running([(0, 900, 400), (1, 900, 400)], instances=2)
    stand = progress(2, generated=[100, 100], elapsed_s=[1.0, 2.0])
    assert names(decide(cluster, waiting([200], [50], [0.6]), stand))[0] == ("suspend", 0, 0)
    excluded = np.array([[True, False]])
    assert names(decide(cluster, waiting([200], [50], [0.6], excluded=excluded), stand))[0] == ("suspend", 1, 1)


def test_after_a_while_the_one_with_most_slack_is_suspended() -> None:
    cluster = running([(0, 450, 400), (0, 450, 300)])
    # 100 tokens in a second at 100 ms a token: 9 s ahead, and 80 ms more with each token to come.
    stand = progress(2, generated=[100, 100], elapsed_s=[1.0, 8.0])
    assert decide(cluster, waiting([200], [50], waited=[0.2]), stand) == []
    entries = decide(cluster, waiting([200], [50], waited=[0.6]), stand)
    assert names(entries) == [("suspend", 0, 0), ("admit", 0, 0)]
    assert "make room for new-0" in entries[0].reason
    assert decide(cluster, waiting([200], [50], waited=[0.6]), stand, suspension=None) == []


def test_nobody_is_suspended_for_one_that_has_missed_its_ttft_or_is_larger() -> None:
    cluster = running([(0, 900, 400)])
    stand = progress(1, generated=[100], elapsed_s=[1.0])
    assert decide(cluster, waiting([200], [50], waited=[2.5]), stand) == []
    assert decide(cluster, waiting([500], [900], waited=[0.6]), stand) == []
    fixed = replace(cluster, movable=np.zeros(1, np.bool_))
    assert decide(fixed, waiting([200], [50], waited=[0.6]), stand) == []


def test_an_slo_infeasible_one_is_suspended_first() -> None:
    cluster = running([(0, 450, 400), (0, 450, 300)])
    stand = progress(2, generated=[100, 100], elapsed_s=[1.0, 500.0])
    assert names(decide(cluster, waiting([200], [50], waited=[0.6]), stand))[0] == ("suspend", 1, 0)


def test_a_suspended_one_resumes_before_the_others_when_its_time_is_up() -> None:
    cluster = running([(0, 300, 900)])
    both = waiting([100, 300], [50, 600], waited=[0.1, 10.0], suspended=np.array([False, True]))
    # 100 tokens in 9 s of 10, and 50 more to come at 20 ms instead of 100: slack.
    patient = replace(both, progress=progress(2, generated=[0, 100], elapsed_s=[0.0, 9.0]))
    assert names(decide(cluster, patient)) == [("admit", 0, 0)]
    hasty = replace(both, progress=progress(2, generated=[0, 100], elapsed_s=[0.0, 57.0]))
    assert names(decide(cluster, hasty))[0] == ("resume", 1, 0)
    forgotten = replace(patient, waited_s=np.array([0.1, 101.0]))
    assert names(decide(cluster, forgotten))[0] == ("resume", 1, 0)


def test_one_whose_gap_allows_a_suspension_goes_before_one_whose_does_not() -> None:
    cluster = running([(0, 450, 400), (0, 450, 300)])
    stand = progress(2, generated=[100, 100], elapsed_s=[1.0, 500.0])
    candidates = waiting([200], [50], waited=[0.6])
    assert names(decide(cluster, candidates, stand))[0] == ("suspend", 1, 0)  # it misses its objective anyway
    assert names(decide(cluster, candidates, replace(stand, gap_s=np.array([6.0, 4.0]))))[0] == ("suspend", 0, 0)


def test_where_every_gap_would_be_missed_the_largest_is_suspended_and_from_then_on_always() -> None:
    cluster = running([(0, 450, 300), (0, 450, 400)])
    candidates = waiting([200], [50], waited=[0.6])
    brief = progress(2, generated=[100, 100], elapsed_s=[1.0, 1.0], gap_s=[2.0, 2.0])
    given_up = decide(cluster, candidates, brief)
    assert names(given_up)[0] == ("suspend", 1, 0)
    assert "misses its gap" in given_up[0].reason
    # One that has missed its gap already loses nothing more, though it makes less room.
    assert names(decide(cluster, candidates, replace(brief, longest_gap_s=np.array([2.1, 2.0]))))[0] == (
        "suspend",
        0,
        0,
    )
    # Without an objective for gaps, nobody with too little slack is suspended.
    hasty = replace(brief, elapsed_s=np.array([30.0, 38.0]), age_s=np.array([30.0, 38.0]))
    assert decide(cluster, candidates, replace(hasty, gap_s=np.full(2, np.inf))) == []


def test_an_objective_for_gaps_below_what_a_pause_takes_is_kept_by_none_however_short_the_others() -> None:
    cluster = running([(0, 450, 300), (0, 450, 400)])
    candidates = waiting([200], [50], waited=[0.6])
    brief = progress(2, generated=[100, 100], elapsed_s=[1.0, 1.0], gap_s=[6.0, 6.0])
    assert "can be suspended" in decide(cluster, candidates, brief)[0].reason
    policy = forecasting(EXACTLY, replace(SUSPENSION, least_gap_s=7.0))
    given_up = policy.decide(cluster, candidates, brief)[0]
    assert (given_up.index, given_up.reason.split(";")[0]) == (1, "misses its gap objective by it")
    assert SUSPENSION.for_objectives(0.2).least_gap_s == SUSPENSION.least_gap_s


def test_no_request_misses_its_gap_for_one_of_a_lower_class() -> None:
    cluster = running([(0, 450, 300), (0, 450, 400)])
    brief = progress(2, generated=[100, 100], elapsed_s=[1.0, 1.0], gap_s=[2.0, 2.0], rank=[1, 0])
    candidates = waiting([200], [50], waited=[0.6])
    assert names(decide(cluster, candidates, brief))[0] == ("suspend", 0, 0)
    assert names(decide(cluster, replace(candidates, rank=np.array([1])), brief))[0] == ("suspend", 0, 0)
    assert decide(cluster, replace(candidates, rank=np.array([2])), brief) == []


def test_a_batch_request_without_a_bound_is_suspended_before_an_interactive_one() -> None:
    cluster = running([(0, 450, 400), (0, 450, 300)])
    both = progress(2, generated=[100, 100], elapsed_s=[1.0, 1.0], gap_s=[2.0, np.inf])
    assert names(decide(cluster, waiting([200], [50], waited=[0.6]), both))[0] == ("suspend", 1, 0)


def test_a_suspended_one_that_has_missed_its_gap_waits_for_room_but_not_for_ever() -> None:
    cluster = running([(0, 300, 900)])
    missed = progress(2, generated=[0, 100], elapsed_s=[0.0, 9.0], gap_s=[2.0, 2.0])
    both = waiting([100, 300], [50, 600], waited=[0.1, 10.0], suspended=np.array([False, True]), progress=missed)
    assert names(decide(cluster, both)) == [("admit", 0, 0)]
    forgotten = replace(both, waited_s=np.array([0.1, SUSPENSION.longest_missed_s + 1.0]))
    assert names(decide(cluster, forgotten))[0] == ("resume", 1, 0)


def test_a_suspended_one_resumes_before_its_longest_gap_whatever_else_it_misses() -> None:
    cluster = running([(0, 300, 900)])
    both = waiting([100, 300], [50, 600], waited=[0.1, 10.0], suspended=np.array([False, True]))
    hopeless = progress(2, generated=[0, 100], elapsed_s=[0.0, 500.0])
    assert names(decide(cluster, replace(both, progress=hopeless))) == [("admit", 0, 0)]
    bound = replace(hopeless, gap_s=np.array([np.inf, 11.0]))
    assert names(decide(cluster, replace(both, progress=bound)))[0] == ("resume", 1, 0)


def test_first_come_first_served_is_honoured() -> None:
    cluster = running([(0, 100, 50)])
    candidates = waiting([300, 100], [300, 100], waited=[0.3, 0.2])
    assert [e.index for e in decide(cluster, candidates)] == [1, 0]
    policy = forecasting(EXACTLY, SUSPENSION, "fcfs")
    assert [e.index for e in policy.decide(cluster, candidates, progress(1))] == [0, 1]


def test_the_oldest_gets_its_share() -> None:
    policy = forecasting(replace(EXACTLY, age_share=1.0), None)
    order = []
    for turn in range(40):
        cluster = running([(0, 550, 100)])  # room for either, and not for both
        candidates = waiting([250, 100], [150, 50], waited=[10.0 + turn, 0.1])
        entries = policy.decide(cluster, candidates, progress(1))
        order += [entry.index for entry in entries]
        if 0 in order:
            break
    # The small one brings an eighth of the credit that the large one needs.
    assert order == [1] * 8 + [0]


def test_without_a_step_time_model_nobody_is_suspended() -> None:
    cluster = replace(running([(0, 900, 400)]), step_base_s=None, step_request_s=None, step_token_s=None)
    stand = progress(1, generated=[100], elapsed_s=[1.0])
    assert decide(cluster, waiting([200], [50], waited=[0.6]), stand) == []


@given(st.integers(0, 2**32 - 1))
def test_whatever_comes_nobody_enters_twice_and_nobody_is_suspended_twice(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [(int(random.integers(3)), int(random.integers(1, 400)), float(random.integers(1, 900))) for _ in range(9)]
    cluster, count = running(rows, instances=3), int(random.integers(1, 12))
    candidates = waiting(
        random.integers(1, 600, count).tolist(),
        random.uniform(1, 900, count).tolist(),
        random.uniform(0, 3, count).tolist(),
        suspended=random.random(count) > 0.6,
        progress=progress(count, generated=random.integers(0, 90, count), elapsed_s=random.uniform(0, 20, count)),
    )
    stand = progress(9, generated=random.integers(1, 90, 9), elapsed_s=random.uniform(0, 20, 9))
    entries = decide(cluster, candidates, stand)
    entered = [entry.index for entry in entries if entry.kind != "suspend"]
    gone = [entry.index for entry in entries if entry.kind == "suspend"]
    assert len(entered) == len(set(entered))
    assert len(gone) == len(set(gone))
    for entry in entries:
        if entry.kind != "suspend":
            assert (entry.kind == "resume") == bool(candidates.suspended[entry.index])
        else:
            assert entry.instance == rows[entry.index][0]
