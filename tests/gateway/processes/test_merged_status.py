"""The status of several processes as one, on statuses as they make them."""

from typing import Any

import pytest

from ares.gateway.processes.merged_status import Part, merged

WINDOWS: dict[str, list[float]] = {"ttft_s": [], "tpot_s": [], "longest_gap_s": [], "prediction_error_tokens": []}


def instance(name: str, *, healthy: bool = True, left: int | None = None, sessions: int = 0) -> dict[str, Any]:
    row = {"name": name, "url": f"http://{name}", "role": "decode", "healthy": healthy, "left": left}
    return row | {"why": None if healthy else "starting"} | ({"sessions": sessions} if healthy else {})


def part(process: int, instances: list[dict[str, Any]], ttft_s: list[float], **status: Any) -> Part:
    base = {
        "preset": "ares",
        "controller": {"where": "elsewhere", "holder": "other", "missed_periods": 3},
        "suspensions": 1,
        "waiting": 2,
        "backlog": 3,
        "backlog_tokens": 40,
        "suspended": 0,
        "instances": instances,
        "requests": [{"id": f"r{process}"}],
        "recent": {},
        "migrations": [{"request_id": f"m{process}", "started_at": 10.0 - process}],
        "learners": [],
        "learner_ages_s": {},
        "process": {"tasks": 10},
        "connectors": {name["name"]: {} for name in instances},
    }
    return Part(process, 100 + process, f"g-{process}", base | status, WINDOWS | {"ttft_s": ttft_s}, 1, 0)


def test_requests_of_all_instances_once_and_counts_as_sums() -> None:
    first = part(1, [instance("a", sessions=2), instance("b", healthy=False)], [1.0, 2.0])
    second = part(0, [instance("a", sessions=3, left=4), instance("b", sessions=1)], [3.0], learner_ages_s={"l": 5.0})
    found = merged([first, second], "g", 1000)
    assert found["gateway"] == "g"
    assert [row["id"] for row in found["requests"]] == ["r1", "r0"]
    assert [found[name] for name in ("suspensions", "waiting", "backlog", "backlog_tokens")] == [2, 4, 6, 80]
    # An instance that only one of them hears yet is described by that one.
    assert found["instances"] == [instance("a", sessions=5, left=4), instance("b", sessions=1)]
    assert found["recent"]["ttft_s"] == {"count": 3, "p50": 2.0, "p90": pytest.approx(2.8), "p99": pytest.approx(2.98)}
    assert [move["request_id"] for move in found["migrations"]] == ["m1", "m0"]
    assert found["learner_ages_s"] == {"l": 5.0}
    assert found["process"] == {"tasks": 20}
    shown = {"pid": 101, "process": 1, "gateway": "g-1", "ready": True, "requests": 1, "tasks": 10}
    assert found["processes"][1] == shown
    assert [move["request_id"] for move in merged([first, second], "g", 1)["migrations"]] == ["m0"]


@pytest.mark.parametrize(
    ("controllers", "where"),
    [
        ([("elsewhere", "other"), ("elsewhere", "other")], "elsewhere"),
        ([("elsewhere", "g-1"), ("elsewhere", "other")], "here"),
        ([("elsewhere", "other"), ("here", None)], "here"),
        ([("nowhere", None), ("nowhere", None)], "nowhere"),
    ],
)
def test_moves_are_decided_here_where_one_of_them_does(controllers: list[tuple[str, str | None]], where: str) -> None:
    parts = [
        part(n, [], [], controller={"where": one, "holder": holder, "missed_periods": 3})
        for n, (one, holder) in enumerate(controllers)
    ]
    assert merged(parts, "g", 1000)["controller"]["where"] == where
