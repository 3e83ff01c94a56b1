"""What is cached of the requests that wait: looked up within a bounded time, and known for a while."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ares.gateway.control import cached_candidates
from ares.gateway.control.cached_candidates import CachedCandidates


class Lookups:
    """Each takes `takes_s` on a clock of its own, and finds as many tokens as the request has been looked up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes_s: float = 0.0) -> None:
        self.now, self.takes_s, self.asked = 100.0, takes_s, list[str]()
        monkeypatch.setattr(cached_candidates.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cached_candidates, "cached_tokens", self.look_up)

    def look_up(self, placement: str, instances: Sequence[Any]) -> np.ndarray[Any, Any]:
        self.now += self.takes_s
        self.asked.append(placement)
        return np.full(len(instances), self.asked.count(placement), np.int64)


def sessions(*names: str) -> list[Any]:
    return [SimpleNamespace(id=name, placement=name) for name in names]


TWO: Any = [SimpleNamespace(name="decode-0"), SimpleNamespace(name="decode-1")]


def test_what_was_found_is_known_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups, known = Lookups(monkeypatch), CachedCandidates()
    waiting = sessions("a", "b")
    assert known.of(waiting, TWO).tolist() == [[1, 1], [1, 1]]
    lookups.now += 0.9
    assert known.of(sessions("b", "c"), TWO).tolist() == [[1, 1], [1, 1]]
    assert lookups.asked == ["a", "b", "c"]
    lookups.now += 0.2
    assert known.of(waiting, TWO).tolist() == [[2, 2], [2, 2]], "a has been away, b is old"
    assert known.of(waiting, TWO[:1]).tolist() == [[3], [3]], "other instances"
    assert known.of([], TWO).shape == (0, 2)


def test_a_decision_spends_little_time_and_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups, known = Lookups(monkeypatch, takes_s=0.0015), CachedCandidates()
    waiting = sessions(*"abcde")
    assert known.of(waiting, TWO)[:, 0].tolist() == [1, 1, 0, 0, 0]
    assert known.of(waiting, TWO)[:, 0].tolist() == [1, 1, 1, 1, 0]
    assert known.of(waiting, TWO)[:, 0].tolist() == [1] * 5
    assert lookups.asked == list("abcde")
    lookups.now += 2.0
    known.of(waiting, TWO)
    assert lookups.asked[5:] == ["a", "b"], "the oldest first"


def test_without_instances_there_is_nothing_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Lookups(monkeypatch)
    known = CachedCandidates()
    assert known.of(sessions("a", "b"), []).shape == (2, 0)
    assert known.of([], []).shape == (0, 0)
    assert known.of([], TWO).dtype == np.int64
    assert known.of(sessions("a"), TWO).tolist() == [[2, 2]], "as soon as there are some"
