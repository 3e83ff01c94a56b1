"""Reports of learners: the newest of each, their ages, and each event once in the log and the metrics."""

import logging
from typing import Any

import pytest

from ares.gateway.records.learners import Learners
from ares.gateway.records.metrics import Metrics
from ares.gateway.tuning import Tuning
from ares.protocol.learner_report import Report
from tests.gateway.learner_reports import NOW, event, report


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def learners(metrics: Metrics, clock: Clock, caplog: pytest.LogCaptureFixture) -> Learners:
    caplog.set_level(logging.INFO, logger="ares.gateway.records.learners")
    made = Learners(metrics, Tuning(learner_old_s=60, kept_learners=2), clock)
    clock.now += 100
    return made


def made(**fields: Any) -> Report:
    return Report.model_validate(report(**fields))


def logged(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def counted(metrics: Metrics, kind: str) -> float | None:
    return metrics.registry.get_sample_value("ares_predictor_events_total", {"event": kind})


def test_the_newest_report_of_each_learner_is_kept_with_its_age(learners: Learners, clock: Clock) -> None:
    learners.take(made(learner="a", doing="collecting"))
    clock.now += 5
    learners.take(made(learner="b"))
    clock.now += 5
    learners.take(made(learner="a", doing="training"))
    clock.now += 2
    shown = learners.as_json()
    assert [(one["learner"], one["doing"], one["age_s"], one["old"]) for one in shown] == [
        ("a", "training", 2, False),
        ("b", "trial", 7, False),
    ]
    assert shown[0] == report(learner="a", doing="training") | {"age_s": 2, "old": False}


def test_an_old_report_is_shown_as_old_and_logged_once(
    learners: Learners, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    learners.take(made())
    clock.now += 60
    learners.check()
    assert not learners.as_json()[0]["old"]
    assert logged(caplog, "no report") == []
    clock.now += 15
    learners.check()
    learners.check()
    assert [(one["age_s"], one["old"]) for one in learners.as_json()] == [(75, True)]
    assert logged(caplog, "no report") == ["learner host-1: no report for 75 s"]
    learners.take(made())
    assert logged(caplog, "again") == ["learner host-1 reports again, after 75 s"]
    clock.now += 61
    learners.check()
    assert len(logged(caplog, "no report")) == 2


def test_of_too_many_learners_the_one_that_reported_longest_ago_is_forgotten(
    learners: Learners, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "aba":
        learners.take(made(learner=name))
        clock.now += 10
    learners.take(made(learner="c"))
    assert list(learners.ages()) == ["c", "a"]
    assert logged(caplog, "forgotten") == [
        "learner b: forgotten after 20 s without a report, for there are more than 2 learners"
    ]


def test_each_event_is_logged_and_counted_once(
    learners: Learners, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    events = [event(1, "trained"), event(2, "promoted")]
    learners.take(made(events=events[:1]))
    learners.take(made(events=events[:1]))
    learners.take(made(events=events))
    assert logged(caplog, "predictor d") == [
        "predictor dddddddddddd trained: trained: the loss is 1 tokens",
        "predictor dddddddddddd promoted: promoted: the loss is 2 tokens",
    ]
    # The same kind and version at another time is another event; the oldest ones leave the report.
    learners.take(made(events=[events[1], event(3, "promoted")]))
    assert (counted(metrics, "trained"), counted(metrics, "promoted")) == (1, 2)
    assert len(logged(caplog, "predictor d")) == 3


def test_events_before_the_start_of_the_gateway_are_no_news(
    learners: Learners, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    before = event(1, "promoted") | {"time": NOW - 101}
    learners.take(made(events=[before, event(2, "demoted")]))
    assert len(logged(caplog, "1 events before this gateway started")) == 1
    assert (counted(metrics, "promoted"), counted(metrics, "demoted")) == (None, 1)
    learners.take(made(events=[before, event(2, "demoted")]))
    assert (counted(metrics, "promoted"), counted(metrics, "demoted")) == (None, 1)


def test_what_an_operator_should_look_at_is_a_warning(learners: Learners, caplog: pytest.LogCaptureFixture) -> None:
    kinds = ("promoted", "demoted", "error")
    learners.take(made(events=[event(number, kind) for number, kind in enumerate(kinds)]))
    levels = {record.getMessage().split()[2]: record.levelname for record in caplog.records[1:]}
    assert levels == {"promoted:": "INFO", "demoted:": "WARNING", "error:": "WARNING"}


def test_kinds_that_this_gateway_does_not_know_are_counted_together(learners: Learners, metrics: Metrics) -> None:
    learners.take(made(events=[event(number, f"kind_{number}") for number in range(5)]))
    assert counted(metrics, "other") == 5
