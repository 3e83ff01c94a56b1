from typing import Any

from ares.predicted_load import layout_of, predicted_peak, predicted_remaining
from ares.protocol import messages


def row(resident: int, median: float | None, state: Any = "running") -> messages.Row:
    return messages.Row("k", resident, 0, state, None if median is None else (1.0, median, 2 * median))


def load(*rows: messages.Row) -> messages.Telemetry:
    return messages.Telemetry(1, 0, len(rows), 0, 0, 0.0, 0, 0, list(rows))


def test_predicted_sums_medians() -> None:
    assert predicted_remaining(load(row(1, 5.0), row(1, 7.0), row(1, None))) == 12
    assert predicted_remaining(load(row(1, None))) is None
    assert predicted_remaining(load()) is None


def test_predicted_peak() -> None:
    """Against the sum over requests, step by step."""
    known = [(100, 50.0), (300, 5.0), (20, 200.0), (500, 0.0), (10, 50.0)]
    stays = 70

    def held(step: int) -> float:
        return stays + sum(resident + step for resident, left in known if step <= left)

    rows = [row(resident, left) for resident, left in known]
    assert predicted_peak(load(*rows, row(stays, None))) == max(held(step) for step in range(201))


def test_predicted_peak_of_nothing_and_of_nonsense() -> None:
    assert predicted_peak(load()) is None
    assert predicted_peak(load(row(100, None))) is None
    assert predicted_peak(load(row(100, float("nan")), row(50, float("inf")))) is None
    assert predicted_peak(load(row(100, -30.0), row(50, float("nan")))) == 150


def test_the_layout_of_an_instance() -> None:
    hello = messages.Hello("d", "decode", "b", messages.Peer("e", "h", 1), 16, 100, 4096, {})
    assert layout_of(hello).capacity_tokens(100) == 1600
