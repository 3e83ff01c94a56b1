"""What a predictor knows of a request, as text: what another instance made is taken, and nothing else is."""

import base64
from dataclasses import replace

import numpy as np
import pytest

from ares.engine.prediction.carried_forecast import LONGEST, LONGEST_OF_MOVE, Carried, decode, encode

MEAN = np.array([-127, 5, 0, 127], np.int8)
MADE = Carried("network", 7, np.linspace(0, 0.999, 33).astype(np.float32), 12, MEAN, 0.02)
FORECAST = base64.b64encode(np.array([0.1, 0.1, 0.1], "<f2").tobytes()).decode()


def numbers(values: list[float]) -> str:
    return base64.b64encode(np.array(values, "<f2").tobytes()).decode()


def average(step: float = 0.02, count: int = 4) -> str:
    return base64.b64encode(np.array(step, "<f4").tobytes() + bytes(count)).decode()


def test_it_comes_back() -> None:
    got = decode(encode(MADE), "network", 33, 4)
    assert got is not None
    assert (got.forecaster, got.position, got.averaged) == ("network", 7, 12)
    np.testing.assert_allclose(got.ended, MADE.ended, atol=1e-3)
    np.testing.assert_array_equal(got.mean, MEAN)
    assert got.step == pytest.approx(0.02)


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "network",
        "network:7",
        "network:7:!",
        f"network::{FORECAST}",
        f"network:-1:{FORECAST}",
        f"network:9999999999:{FORECAST}",
        f"network:²:{FORECAST}",
        "network:7:" + numbers([0.1] * 2),
        "network:7:" + numbers([0.1, 0.2, float("nan")]),
        "network:7:" + numbers([0.1, 0.2, 1.5]),
        "network:7:" + numbers([0.1, 0.2, -0.5]),
        f"network:7:A{FORECAST}",
        f"another:7:{FORECAST}",
        f"network:7:{FORECAST}:3",
        f"network:7:{FORECAST}:3:{average()}:",
        f"network:7:{FORECAST}:3:",
        f"network:7:{FORECAST}:3:!",
        f"network:7:{FORECAST}:x:{average()}",
        f"network:7:{FORECAST}:3:{average(count=5)}",
        f"network:7:{FORECAST}:3:{average(float('nan'))}",
        f"network:7:{FORECAST}:3:{average(float('inf'))}",
        f"network:7:{FORECAST}:3:{average(-0.02)}",
        f"network:7:{FORECAST}:3:{average(1e9)}",
    ],
)
def test_what_is_not_one_is_not_taken(text: object) -> None:
    assert decode(f"network:7:{FORECAST}:3:{average()}", "network", 3, 4) is not None
    assert decode(text, "network", 3, 4) is None


def test_a_forecast_alone_is_taken() -> None:
    got = decode(f"network:7:{FORECAST}", "network", 3, 4)
    assert got is not None
    assert got.averaged == 0


def test_without_a_network_for_it_none_is_taken() -> None:
    assert decode(f":7:{FORECAST}", "", 3, 4) is None


def test_what_is_too_long_stays_where_it_is() -> None:
    """The average first: it is worth less than the forecast."""
    wide = replace(MADE, mean=np.zeros(LONGEST, np.int8))
    assert encode(wide) == encode(replace(MADE, averaged=0))
    assert len(encode(wide, LONGEST_OF_MOVE)) > LONGEST
    assert encode(replace(MADE, ended=np.zeros(LONGEST, np.float32))) == ""
