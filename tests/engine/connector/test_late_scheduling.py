"""How long a busy engine waits for a request that was announced, by vLLM's own queue and a clock that a test sets."""

import queue
from typing import Any

import pytest

pytest.importorskip("vllm")

from ares.engine.connector.late_scheduling import LateScheduling
from ares.engine.expected_requests import ExpectedRequests
from ares.engine.vllm_api import EngineCoreProc

STEP_S = 0.1


class Engine:
    """What `LateScheduling` uses of vLLM's engine core, with a clock that waiting for the queue moves on.

    `coming` are requests and the times at which they come.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.batch_queue: Any = ["a step that runs"]
        self.input_queue = self
        self.coming: list[tuple[float, str]] = []
        self.taken: list[tuple[float, str]] = []
        self.expected = ExpectedRequests()
        self.late = LateScheduling(self.expected, lambda: self.now)

    def get(self, timeout: float) -> tuple[str]:
        """Wait as `queue.Queue`."""
        if not self.coming or self.coming[0][0] > self.now + timeout:
            self.now += timeout
            raise queue.Empty
        at, request = self.coming.pop(0)
        self.now = max(self.now, at)
        return (request,)

    def _handle_client_request(self, request: str) -> None:
        self.taken.append((round(self.now, 6), request))
        self.expected.arrived(request)

    def step(self, seconds: float = STEP_S) -> float:
        """Let the engine take requests as it does after each step, until the next ends; return how long it waited."""
        began = self.now
        self.late.wait(self)
        waited = self.now - began
        self.now = began + max(seconds, waited)
        return pytest.approx(waited)  # type: ignore[return-value]


@pytest.fixture
def engine() -> Engine:
    """An engine that has done some steps."""
    engine = Engine()
    for _ in range(3):
        assert engine.step() == 0.0
    return engine


def test_an_expected_request_is_waited_for_as_long_as_the_step_leaves_time(engine: Engine) -> None:
    engine.expected.add("moved", 2.0, engine.now)
    assert engine.step() == 0.75 * STEP_S
    engine.coming = [(engine.now + 0.03, "moved")]
    assert engine.step() == 0.03
    assert [request for _, request in engine.taken] == ["moved"]
    assert engine.step() == 0.0


def test_others_that_come_meanwhile_are_taken_and_the_waiting_goes_on(engine: Engine) -> None:
    engine.expected.add("moved", 2.0, engine.now)
    engine.coming = [(engine.now + 0.01, "another"), (engine.now + 0.02, "moved"), (engine.now + 0.04, "after it")]
    assert engine.step() == 0.02
    assert [request for _, request in engine.taken] == ["another", "moved"]


def test_one_that_does_not_come_is_given_up(engine: Engine) -> None:
    engine.expected.add("lost", 0.03, engine.now)
    assert engine.step() == 0.03
    assert engine.step() == 0.0


def test_where_nothing_runs_nothing_is_waited_for(engine: Engine) -> None:
    engine.expected.add("moved", 2.0, engine.now)
    engine.batch_queue = []
    assert engine.step() == 0.0
    engine.batch_queue = None
    assert engine.step() == 0.0


def test_the_time_in_which_nothing_ran_is_no_step(engine: Engine) -> None:
    engine.batch_queue = []
    engine.step(50.0)
    engine.batch_queue = ["a step that runs"]
    engine.expected.add("moved", 2.0, engine.now)
    assert engine.step() == 0.75 * STEP_S


def test_the_shortest_of_the_last_steps_counts(engine: Engine) -> None:
    engine.step(0.04)
    engine.step(1.0)
    engine.expected.add("moved", 2.0, engine.now)
    assert engine.step() == 0.03


def test_short_steps_keep_the_time_that_scheduling_takes() -> None:
    engine = Engine()
    for _ in range(3):
        engine.step(0.008)
    engine.expected.add("moved", 2.0, engine.now)
    assert engine.step(0.004) == 0.003
    assert engine.step(0.004) == 0.0


def test_vllm_calls_it_in_its_loop_before_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through vLLM's own loop, of an engine that has work and an empty queue, for two steps."""
    happened: list[str] = []
    lives = iter((True, True, False))
    for name, replacement in {
        "_process_input_queue": vars(EngineCoreProc)["_process_input_queue"],  # put back afterwards
        "_handle_shutdown": lambda _: next(lives),
        "_maybe_publish_request_counts": lambda _: None,
        "_process_engine_step": lambda _: happened.append("step"),
        "has_work": lambda _: True,
    }.items():
        monkeypatch.setattr(EngineCoreProc, name, replacement)
    core = EngineCoreProc.__new__(EngineCoreProc)
    core.input_queue = queue.Queue()
    late = LateScheduling(ExpectedRequests())
    monkeypatch.setattr(late, "wait", lambda engine: happened.append("waited" if engine is core else "?"))
    late.install()
    with pytest.raises(SystemExit):
        core.run_busy_loop()
    assert happened == ["waited", "step"] * 2
