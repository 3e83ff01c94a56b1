"""Reports of a learner, as it sends them."""

from typing import Any

CHAMPION, CHALLENGER = "c" * 64, "d" * 64
NOW = 1_790_000_000.0


def event(number: int, kind: str = "promoted", **numbers: float) -> dict[str, Any]:
    text = f"{kind}: the loss is {number} tokens"
    return {"time": NOW - 10 + number, "event": kind, "version": CHALLENGER, "text": text} | numbers


def losses(number: int = 0, **values: Any) -> dict[str, Any]:
    measured = {"time": NOW - 600 + 10 * number, "outputs": 100 + number, "position": "all"}
    return measured | {"curve": 120.5, "champion": 99.0, "challenger": 97.25} | values


def report(**fields: Any) -> dict[str, Any]:
    return {
        "learner": "host-1",
        "model": "some/model",
        "time": NOW,
        "frozen": False,
        "champion": {"version": CHAMPION, "kind": "network", "trained_outputs": 812, "since": NOW - 3600},
        "challenger": {"version": CHALLENGER, "kind": "network", "trained_outputs": 1400, "since": NOW - 60},
        "doing": "trial",
        "outputs": {"recorded": 1234, "needed": 1500, "dropped": {"left": 7}},
        "losses": [losses()],
        "instances": {"decode-0": CHAMPION, "decode-1": ""},
        "events": [event(1, "trained", outputs=1400)],
    } | fields
