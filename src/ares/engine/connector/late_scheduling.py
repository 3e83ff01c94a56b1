"""A moved request gets into the next step of a busy engine, not into the one after it.

With asynchronous scheduling vLLM schedules the next step as soon as the running one has begun (v1/engine/core.py,
0.32: `step_with_batch_queue`), and then waits for the running one with whatever has come in its queue. A request that
comes meanwhile therefore waits for the rest of the running step and for the whole of the next one. The engine needs
the next step only when the running one ends, though: while a request is expected, its thread first takes what comes,
for three quarters of a step, and schedules then. Other requests get their tokens as before.
"""

import queue
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ares.engine.expected_requests import ExpectedRequests
from ares.engine.vllm_api import EngineCoreProc

# What is left of a step for the scheduling of the next one: a share of it, and at least so many seconds.
_SHARE_LEFT = 0.25
_LEAST_LEFT_S = 0.005
# Of so many recent steps the shortest counts: the next one may be as short.
_STEPS = 4

# vLLM has no hook at this point of its loop: `install` replaces this method.
_take_requests: Callable[[Any], None] = EngineCoreProc._process_input_queue  # noqa: SLF001


class LateScheduling:
    """Lets an engine wait for expected requests before it schedules a step ahead.

    Parameters
    ----------
    expected
        Those that were announced.
    clock
        Seconds; `expected` has the same clock.
    """

    def __init__(self, expected: ExpectedRequests, clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._clock = expected, clock
        self._steps_s: deque[float] = deque(maxlen=_STEPS)
        self._began: float | None = None

    def install(self) -> None:
        """Replace `EngineCoreProc._process_input_queue` in this process, which has one engine core."""

        def take_requests(engine: Any) -> None:
            _take_requests(engine)
            self.wait(engine)

        EngineCoreProc._process_input_queue = take_requests  # noqa: SLF001

    def wait(self, engine: Any) -> None:
        """Take what comes to the engine until the expected requests are here, or the next step has to be scheduled.

        Parameters
        ----------
        engine
            vLLM's engine core: its thread calls this after each step, before it schedules another one.
        """
        now = self._clock()
        if not engine.batch_queue:  # nothing runs, so that nothing would be scheduled ahead
            self._began = None
            return
        # A step begins when the one before it has ended, which is when the engine comes here.
        if self._began is not None:
            self._steps_s.append(now - self._began)
        self._began = now
        if not self._steps_s:
            return
        step_s = min(self._steps_s)
        until = now + step_s - max(_SHARE_LEFT * step_s, _LEAST_LEFT_S)
        while (left_s := min(until, self._expected.until(now)) - now) > 0:
            try:
                request = engine.input_queue.get(timeout=left_s)
            except queue.Empty:
                return
            engine._handle_client_request(*request)  # noqa: SLF001
            now = self._clock()
