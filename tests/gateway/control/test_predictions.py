"""The live error histogram and what an instance is expected to generate."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from ares.gateway.control.predictions import PredictionScores
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.records.window import Window
from ares.gateway.tuning import Tuning
from ares.protocol import messages
from tests.gateway.fakes import FakeInstance
from tests.waiting import eventually


def row(resident: int, median: float | None, state: Any = "running") -> messages.Row:
    return messages.Row("k", resident, 0, state, None if median is None else (1.0, median, 2 * median))


def sequence(emitted: int, version: str = "") -> Any:
    state = SimpleNamespace(telemetry=msgspec.structs.replace(load(), predictor=version))
    instance = SimpleNamespace(state=state)
    return SimpleNamespace(id="s", key="k", prompt=[0] * 10, emitted=[0] * emitted, instance=instance)


def sample(
    metrics: Metrics, position: int, side: str, name: str = "sum", part: str = "output", version: str = ""
) -> float | None:
    labels = {"position": str(position), "side": side, "part": part, "version": version}
    return metrics.registry.get_sample_value(f"ares_prediction_error_tokens_{name}", labels)


def test_the_first_prediction_of_each_stage_is_judged() -> None:
    metrics = Metrics()
    scores = PredictionScores(metrics, Window())
    for output, median in ((1, 50.0), (20, 10.0), (70, 40.0), (80, 0.0)):
        scores.record([sequence(output)], {"k": row(10 + output, median)})
    scores.score(sequence(100))
    assert sample(metrics, 0, "under") == 49  # 50 expected after 1, 99 came
    assert sample(metrics, 64, "over") == 10  # 40 expected after 70, 30 came
    assert sample(metrics, 0, "under", "count") == sample(metrics, 64, "over", "count") == 1


def test_errors_in_the_reasoning_and_in_the_answer_are_apart() -> None:
    metrics = Metrics()
    scores = PredictionScores(metrics, Window())
    for output, median in ((1, 50.0), (70, 40.0)):
        scores.record([sequence(output)], {"k": row(10 + output, median)})
    scores.score(sequence(100), 70)
    assert sample(metrics, 0, "under", part="reasoning") == 49
    assert sample(metrics, 64, "over", part="answer") == 10  # the 71st token is the first of the answer
    assert sample(metrics, 64, "over", part="reasoning") is None


def test_errors_are_counted_by_the_version_that_predicted() -> None:
    metrics = Metrics()
    scores = PredictionScores(metrics, Window())
    first, second = "1" * 64, "2" * 64
    scores.record([sequence(1, first)], {"k": row(11, 50.0)})
    scores.record([sequence(70, second)], {"k": row(80, 40.0)})
    scores.score(sequence(100, second))
    assert sample(metrics, 0, "under", version="1" * 12) == 49  # the instance had another one then
    assert sample(metrics, 64, "over", version="2" * 12) == 10


def test_the_metrics_have_the_errors_of_few_versions() -> None:
    metrics = Metrics()
    scores = PredictionScores(metrics, Window(), kept_versions=2)

    def score(version: str) -> None:
        scores.record([sequence(1, version)], {"k": row(11, 50.0)})
        scores.score(sequence(100, version))

    for digit in "1213":
        score(digit * 64)
    counts = [sample(metrics, 0, "under", "count", version=digit * 12) for digit in "123"]
    assert counts == [2, None, 1]


def test_what_did_not_finish_is_not_judged() -> None:
    metrics = Metrics()
    scores = PredictionScores(metrics, Window())
    scores.record([sequence(5)], {"k": row(15, 50.0)})
    scores.forget(sequence(5))
    scores.score(sequence(100))
    assert sample(metrics, 0, "under") is None


def test_rows_without_a_usable_prediction_are_passed_over() -> None:
    metrics = Metrics()
    scores = PredictionScores(metrics, Window())
    for found in (row(15, None), row(15, float("nan")), row(15, 3.0, "waiting")):
        scores.record([sequence(5)], {"k": found})
    scores.score(sequence(100))
    assert sample(metrics, 0, "under") is None


def load(*rows: messages.Row) -> messages.Telemetry:
    return messages.Telemetry(1, 0, len(rows), 0, 0, 0.0, 0, 0, list(rows))


@pytest.fixture
async def prefill(fakes: list[FakeInstance]) -> AsyncIterator[Instance]:
    fakes[0].foretells = True
    async with http_client() as http:
        pool = Pool([fake.url for fake in fakes], http, 0.02, tuning=Tuning(kept_reports=3))
        pool.start()
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in pool.instances), 15)
        yield pool.instances[0]
        await pool.stop()


async def test_a_prefill_brings_a_prediction(prefill: Instance) -> None:
    await prefill.engine.complete(Sampling({}, 10).prefill_request("key", [7] * 5, []))
    await eventually(lambda: prefill.control.prediction("key") == messages.Predicted("key", (1, 5, 1000)), 15)
    assert prefill.control.prediction("another") is None


async def test_predictions_that_nobody_asks_for_are_forgotten(fakes: list[FakeInstance], prefill: Instance) -> None:
    for number in range(5):
        fakes[0].post(messages.Predicted(f"key-{number}", (1.0, 2.0, 3.0)))
    await eventually(lambda: prefill.control.prediction("key-4") is not None, 15)
    assert [number for number in range(5) if prefill.control.prediction(f"key-{number}")] == [2, 3, 4]
