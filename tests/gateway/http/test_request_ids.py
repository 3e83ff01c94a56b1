"""Which running request an id means, and that none is meant by chance."""

import pytest

from ares.gateway.http.request_ids import resolve

HEX = "3f1c9a0b7d2e4c5f8a9b0c1d2e3f4a5b"
OTHER = "3f1c9a0b00000000000000000000000a"
RUNNING = [HEX, f"{OTHER}-0", f"{OTHER}-1", "gravity", "tides-0", "tides-1", "waves#2", "chatcmpl-mine", "lens-flare"]


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (HEX, [HEX]),
        (f"chatcmpl-{HEX}", [HEX]),
        (f"cmpl-{HEX}", [HEX]),
        (f"chatcmpl-{HEX}-0", [HEX]),
        (f"chatcmpl-{HEX}-1", []),
        (f"chatcmpl-{OTHER}-1", [f"{OTHER}-1"]),
        (f"cmpl-{OTHER}", [f"{OTHER}-0", f"{OTHER}-1"]),
        ("3f1c9a0b7d", [HEX]),
        ("chatcmpl-3f1c9a0b7d", [HEX]),
        ("3f1c9a0b", [HEX, f"{OTHER}-0", f"{OTHER}-1"]),
        ("3f1c9a", []),
        ("3f1c..4a5b", [HEX]),
        ("chatcmpl-3f1c..4a5b", [HEX]),
        ("3f1c9a..-1", [f"{OTHER}-1"]),
        ("gravity", ["gravity"]),
        ("chatcmpl-gravity", ["gravity"]),
        ("tides", ["tides-0", "tides-1"]),
        ("tides-1", ["tides-1"]),
        ("waves", ["waves#2"]),
        ("chatcmpl-mine", ["chatcmpl-mine"]),
        ("chatcmpl-chatcmpl-mine", ["chatcmpl-mine"]),
        # What is not meant: a request that has ended, whose id another one begins with.
        ("grav", []),
        ("gravity-0", []),
        ("lens", []),
        ("chatcmpl-", []),
        ("", []),
    ],
)
def test_what_is_meant(given: str, ids: list[str]) -> None:
    assert resolve(given, RUNNING) == ids
