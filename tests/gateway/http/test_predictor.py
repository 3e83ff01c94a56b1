"""`/admin/v1/predictor` through a real server: what learners may report, and what operators see of it."""

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ares.gateway.tuning import Tuning
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.http.service import Service, failure, serving
from tests.gateway.learner_reports import CHALLENGER, CHAMPION, NOW, event, losses, report
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

ROUTE = "/admin/v1/predictor"


@pytest.fixture
async def silent(model_folder: Path) -> AsyncIterator[Service]:
    """A gateway without instances, for which a report is old after a moment."""
    tuning = Tuning(learner_old_s=0.3, kept_learners=2)
    async with serving([], model_folder, tuning, workers=["http://127.0.0.1:9"]) as made:
        yield made


def changed(path: str, value: Any) -> dict[str, Any]:
    """A report with another value in one place."""
    made = copy.deepcopy(report())
    place: Any = made
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        place = place[part]
    place[last] = value
    return made


async def test_a_report_is_kept_and_shown(silent: Service) -> None:
    assert (await silent.client.get(ROUTE)).json() == {"learners": []}
    sent = report(events=[event(1, "trained", outputs=1400, low=-2.5), event(2, "promoted", gain=3.5)])
    reply = await silent.client.put(ROUTE, json=sent)
    assert (reply.status_code, reply.json()) == (200, {"learners": 1})
    (shown,) = (await silent.client.get(ROUTE)).json()["learners"]
    age_s = shown.pop("age_s")
    assert 0 <= age_s < 10
    assert shown == sent | {"old": age_s > 0.3}
    status = (await silent.client.get("/admin/v1/status")).json()
    assert status["learners"][0]["champion"] == sent["champion"]
    # It is not dropped when it is old.
    await asyncio.sleep(0.4)
    (shown,) = (await silent.client.get(ROUTE)).json()["learners"]
    assert shown["old"]
    assert shown["age_s"] > max(age_s, 0.4)


async def test_a_curve_and_no_challenger(silent: Service) -> None:
    curve = {"version": "", "kind": "curve", "trained_outputs": 0, "since": NOW}
    sent = report(champion=curve, challenger=None, doing="collecting", losses=[], events=[], instances={})
    assert (await silent.client.put(ROUTE, json=sent)).status_code == 200
    metrics = (await silent.client.get("/metrics")).text
    expected = 'ares_predictor_info{kind="curve",learner="host-1",model="champion",version=""} 1.0'
    assert expected in metrics
    assert 'model="challenger"' not in metrics


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("learner", ""),
        ("learner", " \n"),
        ("learner", "x" * 257),
        ("learner", 1),
        ("time", "1790000000"),
        ("time", -1),
        ("frozen", 0),
        ("champion", None),
        ("champion.version", "c" * 63),
        ("champion.version", "C" * 64),
        ("champion.kind", "lstm"),
        ("champion.trained_outputs", 812.5),
        ("champion.trained_outputs", "812"),
        ("champion.trained_outputs", 1 << 53),
        ("champion.unknown", 1),
        ("challenger.since", None),
        ("doing", ""),
        ("outputs.recorded", -1),
        ("outputs.dropped", {"left": 1.5}),
        ("outputs.dropped", {f"reason {n}": 1 for n in range(65)}),
        ("losses", [losses()] * 201),
        ("losses.0.curve", -1.0),
        ("losses.0.curve", None),
        ("losses.0.position", "<b>"),
        ("instances", {"decode-0": "v1"}),
        ("events", [event(1)] * 51),
        ("events.0.text", "x" * 2001),
        ("events.0.event", "Promoted!"),
        ("events.0.gain", "much"),
        ("unknown", 1),
    ],
)
async def test_what_is_wrong_is_refused_by_name(shared: Service, path: str, value: Any) -> None:
    error = failure(await shared.client.put(ROUTE, json=changed(path, value)), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(path)
    assert error["message"].startswith(f"{path}")
    assert (await shared.client.get(ROUTE)).json() == {"learners": []}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("path", ["losses.0.champion", "time", "events.0.gain"])
async def test_numbers_are_finite(shared: Service, path: str, number: str) -> None:
    body = json.dumps(changed(path, "NUMBER")).replace('"NUMBER"', number)
    reply = await shared.client.put(ROUTE, content=body, headers={"Content-Type": "application/json"})
    assert failure(reply, 400)["param"] == path


async def test_a_network_has_a_version_and_a_curve_none(shared: Service) -> None:
    for part, value in (("version", ""), ("kind", "curve")):
        error = failure(await shared.client.put(ROUTE, json=changed(f"champion.{part}", value)), 400)
        assert error["message"] == "champion: a network has a version, and a curve has none"


async def test_a_field_that_is_missing_is_named(shared: Service) -> None:
    for path in ("doing", "champion", "outputs"):
        sent = report()
        del sent[path]
        assert failure(await shared.client.put(ROUTE, json=sent), 400)["param"] == path
    sent = report()
    del sent["champion"]["since"]
    assert failure(await shared.client.put(ROUTE, json=sent), 400)["param"] == "champion.since"
    for body in (b"", b"[]", b"{"):
        failure(await shared.client.put(ROUTE, content=body, headers={"Content-Type": "application/json"}), 400)


async def test_a_report_is_at_most_256_kib(silent: Service) -> None:
    room = (1 << 18) - len(json.dumps(report()))
    for more, status in ((0, 200), (1, 413)):
        body = json.dumps(report()) + " " * (room + more)
        reply = await silent.client.put(ROUTE, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == status, reply.text
    assert "262144 bytes" in failure(reply, 413)["message"]

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(300):
            yield b" " * 1024

    # Also where the length is not declared.
    failure(await silent.client.put(ROUTE, content=pieces(), headers={"Content-Type": "application/json"}), 413)


async def test_text_is_one_line_without_control_characters(silent: Service) -> None:
    sent = report(learner="host\x1b[31m", events=[event(1) | {"text": "a\n  b\x00c\u2028d"}])
    assert (await silent.client.put(ROUTE, json=sent)).status_code == 200
    (shown,) = (await silent.client.get(ROUTE)).json()["learners"]
    assert (shown["learner"], shown["events"][0]["text"]) == ("host [31m", "a b c d")


async def test_it_needs_the_admin_key(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, admin_key="secret") as service:
        for key in (None, "wrong"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            failure(await service.client.put(ROUTE, json=report(), headers=headers), 401)
            failure(await service.client.get(ROUTE, headers=headers), 401)
        headers = {"Authorization": "Bearer secret"}
        assert (await service.client.put(ROUTE, json=report(), headers=headers)).status_code == 200
        assert len((await service.client.get(ROUTE, headers=headers)).json()["learners"]) == 1


async def test_without_a_key_no_foreign_page_reports(silent: Service) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        failure(await silent.client.put(ROUTE, json=report(), headers=headers), 403)
        failure(await silent.client.get(ROUTE, headers=headers), 403)
    assert (await silent.client.get(ROUTE)).json() == {"learners": []}


async def test_metrics_of_learners(silent: Service) -> None:
    first = losses(0, champion=50.0)
    at_64 = losses(1, position="64", challenger=None)
    await silent.client.put(ROUTE, json=report(losses=[first, at_64, losses(2)], events=[event(10, "promoted")]))
    await silent.client.get("/metrics")
    registry = silent.gateway.metrics.registry

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"ares_predictor_{name}", labels)

    def loss(model: str, position: str = "all") -> float | None:
        return value("loss_tokens", learner="host-1", model=model, position=position)

    versions = {"champion": CHAMPION[:12], "challenger": CHALLENGER[:12]}
    for model, version in versions.items():
        assert value("info", learner="host-1", model=model, version=version, kind="network") == 1
    assert (loss("curve"), loss("champion"), loss("challenger")) == (120.5, 99.0, 97.25)
    assert (loss("champion", "64"), loss("challenger", "64")) == (99.0, None)
    assert value("outputs_recorded", learner="host-1") == 1234
    assert value("events_total", event="promoted") == 1
    age_s = value("report_age_seconds", learner="host-1")
    assert age_s is not None
    assert 0 <= age_s < 10
    # Series of versions that are gone are gone; those of a learner that has fallen silent are not.
    await silent.client.put(ROUTE, json=report(challenger=None, losses=[]))
    await silent.client.get("/metrics")
    assert value("info", learner="host-1", model="challenger", version=CHALLENGER[:12], kind="network") is None
    assert loss("curve") is None


async def test_the_version_of_each_instance(model_folder: Path) -> None:
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder) as service,
    ):
        fakes[1].predictor = CHAMPION
        fakes[2].predictor_refused = (CHALLENGER, "its width is 64, not 896")
        pool = service.gateway.pool
        await eventually(lambda: all(i.health.healthy and i.state.telemetry for i in pool.instances), 15)
        await eventually(lambda: pool.instances[2].state.telemetry.predictor_refused[0], 15)
        await eventually(lambda: pool.instances[1].state.telemetry.predictor, 15)
        rows = (await service.client.get("/admin/v1/status")).json()["instances"]
        assert [row["predictor"] for row in rows] == ["", CHAMPION, ""]
        refused = {"version": CHALLENGER, "why": "its width is 64, not 896"}
        assert [row["predictor_refused"] for row in rows] == [None, None, refused]
        text = (await service.client.get("/metrics")).text
        assert f'ares_instance_predictor_info{{instance="decode-0",version="{CHAMPION[:12]}"}} 1.0' in text
        assert 'ares_instance_predictor_info{instance="decode-1",version=""} 1.0' in text
