"""What `ares status` prints of learners of the predictor and of the versions that instances run."""

import json
from datetime import datetime
from typing import Any

import pytest
from typer.testing import CliRunner

from ares.cli.main import app
from tests.cli.test_operator import INSTANCE
from tests.cli.test_operator import LOAD as OF_EARLIER_INSTANCES
from tests.gateway.learner_reports import CHALLENGER, CHAMPION, NOW, event, losses, report
from tests.http_server import answering

LOAD = OF_EARLIER_INSTANCES | {"predictor": "", "predictor_refused": None}
STATUS: dict[str, Any] = {
    "gateway": "ab12cd34",
    "preset": "ares",
    "controller": {"where": "here", "holder": "ab12cd34", "missed_periods": 0},
    "instances": [
        {"name": "decode-0", **INSTANCE, **LOAD, "predictor": CHAMPION},
        {"name": "decode-1", **INSTANCE, **LOAD},
        {"name": "decode-2", **INSTANCE, **LOAD, "predictor": CHALLENGER},
        {"name": "decode-3", **INSTANCE, "healthy": False, "why": "it cannot be reached"},
    ],
    "requests": [],
    "migrations": [],
    "learners": [],
}


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARES_URL", "ARES_ADMIN_KEY", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def printed(*options: str, **fields: Any) -> str:
    body = json.dumps(STATUS | fields).encode()
    with answering(lambda _: (200, body)) as url:
        done = CliRunner().invoke(app, ["status", "--url", url, *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def learner(**fields: Any) -> dict[str, Any]:
    return report() | {"age_s": 3.2, "old": False} | fields


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def date(time: float) -> list[str]:
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S").split()


def test_champion_challenger_and_losses() -> None:
    text = printed(learners=[learner(losses=[losses(0, champion=1.0), losses(1), losses(2, position="64")])])
    rows = words(text)
    assert "predictor (learner host-1): trial; 1,234 outputs recorded, 1,500 needed; dropped: 7 left" in " ".join(
        text.split()
    )
    assert ["curve", "-", "-", "-", "120.5"] in rows
    assert ["champion", CHAMPION[:12], "812", "outputs", *date(NOW - 3600), "99.0"] in rows
    assert ["challenger", CHALLENGER[:12], "1,400", "outputs", *date(NOW - 60), "97.2"] in rows
    assert "mean CRPS over 101 outputs" in text
    assert "no report" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_instances_with_another_version_are_named() -> None:
    text = printed(learners=[learner()])
    assert f"than the champion: decode-1 (none), decode-2 ({CHALLENGER[:12]})" in " ".join(text.split())
    same = [row | {"predictor": CHAMPION} for row in STATUS["instances"]]
    assert "another version" not in printed(learners=[learner()], instances=same)


def test_the_version_of_each_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(printed().split())
    versions = f"{CHAMPION[:12]} on decode-0; none on decode-1; {CHALLENGER[:12]} on decode-2"
    assert f"versions of the predictor: {versions} decode-3: it cannot be reached" in text
    # In the table where there is room.
    monkeypatch.setenv("COLUMNS", "100")
    text = printed()
    assert "versions of the predictor" not in text
    assert ["decode-0", "decode", "ready", "12", "0", "75%", "4,096", "3", CHAMPION[:12]] in words(text)
    assert ["decode-1", "decode", "ready", "12", "0", "75%", "4,096", "3", "-"] in words(text)


def test_the_newest_events_come_last() -> None:
    events = [event(number, "trained") for number in range(9)] + [event(9, "promoted")]
    rows = [" ".join(row) for row in words(printed(learners=[learner(events=events)])) if CHALLENGER[:12] + ":" in row]
    assert len(rows) == 5
    when = " ".join(date(NOW - 1))
    assert rows[-1] == f"{when} promoted {CHALLENGER[:12]}: promoted: the loss is 9 tokens"


def test_a_learner_that_does_not_report_any_more_is_marked() -> None:
    text = printed(learners=[learner(old=True, age_s=75.4), learner(learner="other")])
    assert "predictor (learner host-1): no report for 75 s; before: trial" in text
    assert "predictor (learner other): trial" in text


def test_a_curve_is_champion_and_there_is_no_challenger() -> None:
    curve = {"version": "", "kind": "curve", "trained_outputs": 0, "since": NOW}
    shown = learner(champion=curve, challenger=None, losses=[], events=[], doing="collecting", frozen=True)
    text = printed(learners=[shown])
    assert "collecting, frozen;" in text
    assert ["champion", "curve", "0", "outputs", *date(NOW), "-"] in words(text)
    assert not [row for row in words(text) if row[:1] == ["challenger"]]
    assert "CRPS" not in text


def test_without_a_learner_only_versions_are_shown() -> None:
    text = printed()
    assert "learner" not in text
    assert f"{CHAMPION[:12]} on decode-0" in text
    none = [row | {"predictor": ""} for row in STATUS["instances"]]
    assert "predictor" not in printed(instances=none)


def test_a_refused_version_is_shown_with_the_reason() -> None:
    refused = {"version": CHALLENGER, "why": "its width is 64, not 896"}
    text = printed(instances=[STATUS["instances"][0] | {"predictor_refused": refused}])
    assert f"decode-0: refused version {CHALLENGER[:12]} of the predictor: its width is 64, not 896" in " ".join(
        text.split()
    )


def test_json_has_everything() -> None:
    assert json.loads(printed("--json", learners=[learner()])) == STATUS | {"learners": [learner()]}
