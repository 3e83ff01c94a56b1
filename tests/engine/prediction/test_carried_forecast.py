"""A forecast as text: what another instance made is taken, and nothing else is."""

import base64

import numpy as np
import pytest

from ares.engine.prediction.carried_forecast import LONGEST, CarriedForecast, decode, encode

MADE = CarriedForecast(7, np.linspace(0, 0.999, 33).astype(np.float32))


def text_of(numbers: list[float]) -> str:
    return base64.b64encode(np.array(numbers, "<f2").tobytes()).decode()


def test_it_comes_back() -> None:
    got = decode(encode("network", MADE), "network", 33)
    assert got is not None
    assert got.position == 7
    np.testing.assert_allclose(got.ended, MADE.ended, atol=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "network",
        "network:7",
        "network:7:!",
        "network::" + text_of([0.1] * 3),
        "network:-1:" + text_of([0.1] * 3),
        "network:9999999999:" + text_of([0.1] * 3),
        "network:7:" + text_of([0.1] * 2),
        "network:7:" + text_of([0.1, 0.2, float("nan")]),
        "network:7:" + text_of([0.1, 0.2, 1.5]),
        "network:7:" + text_of([0.1, 0.2, -0.5]),
        "network:7:A" + text_of([0.1] * 3),
        "another:7:" + text_of([0.1] * 3),
    ],
)
def test_what_is_not_one_is_not_taken(text: object) -> None:
    assert decode("network:7:" + text_of([0.1] * 3), "network", 3) is not None
    assert decode(text, "network", 3) is None


def test_without_a_network_for_it_none_is_taken() -> None:
    assert decode(":7:", "", 0) is None


def test_one_that_is_too_long_stays_where_it_is() -> None:
    long = CarriedForecast(7, np.zeros(LONGEST, np.float32))
    assert encode("network", long) == ""
