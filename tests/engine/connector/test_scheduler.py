"""The scheduler side without an engine: vLLM's own requests and stop check, and the orders of a channel."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

PROMPT = [5, 6, 7]
EOS = 2


class Channel:
    """What the control channel has for the engine thread, and what it is told."""

    def __init__(self) -> None:
        self.gone: dict[str, float] = {}
        self.posted: list[Any] = []

    def post(self, event: Any, _: bytes | None = None) -> None:
        self.posted.append(event)


class Engine:
    """A scheduler side and the steps of vLLM's scheduler that it sees."""

    def __init__(self) -> None:
        from ares.engine.connector.scheduler import Scheduler
        from ares.engine.connector.tracking import Load, Orders

        side = self.side = Scheduler.__new__(Scheduler)
        side._tracked, side._by_key, side._pinned, side._pinned_by_key, side._prefilled = {}, {}, {}, {}, {}
        side._load, side._orders, side._channel = Load(), Orders(), Channel()
        side._copies = SimpleNamespace(ids_of=lambda _: [])
        # Of the stock scheduler, what the end of a request touches.
        side._stop_heartbeat = lambda _: None
        side._reqs_not_processed, side._reqs_in_batch, side._reqs_need_recv = set(), set(), {}
        side.is_bidirectional_kv_xfer_enabled = False

    def add(self, key: str, output: int, **params: Any) -> Any:
        """Add a request that has generated so many tokens."""
        from ares.engine.connector.tracking import Tracked
        from ares.engine.vllm_api import Request, SamplingParams

        arguments = {"max_tokens": 50, "extra_args": {"kv_transfer_params": {"ares_key": key, **params}}}
        request = Request(key, PROMPT, SamplingParams(**arguments), None)
        request.append_output_token_ids([9] * output)
        request.num_computed_tokens = request.num_tokens - 1
        self.side._tracked[key] = self.side._by_key[key] = Tracked(request, key)
        return request

    def carry_out(self, order: Any, *scheduled: str) -> None:
        self.side._carry_out(b"gateway", order, dict.fromkeys(scheduled, 1))

    def goes_on(self, request: Any, token: int = 9) -> bool:
        """Give a request a token; whether it goes on."""
        from vllm.v1.core.sched.utils import check_stop

        request.append_output_token_ids(token)
        if not check_stop(request, 4096):
            return True
        assert self.side.request_finished(request, ([1, 2],)) == (False, None)
        return False


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_requests_of_a_gateway_that_stays_away_end(engine: Engine) -> None:
    from ares.engine.control import Abandoned, Gone

    engine.side._channel.gone["dead"] = 0.0
    running, waiting, other = engine.add("dead/1", 10), engine.add("dead/2", 10), engine.add("alive/1", 10)
    engine.carry_out(Gone("dead"), "dead/1", "alive/1")
    assert [r.max_tokens for r in (running, waiting, other)] == [50, 50, 50]
    engine.carry_out(Abandoned("dead"), "dead/1", "alive/1")
    assert not engine.goes_on(running)
    # What does not run, for example since it was preempted, ends when it does: it has to get a token for that.
    assert not engine.goes_on(waiting)
    assert engine.goes_on(other)
    # Nothing is pinned. And should its stream be read all the same, it does not look like the end of the output.
    assert (engine.side._pinned, engine.side._channel.posted) == ({}, [])
    assert running.stop_reason == waiting.stop_reason == "migrated"
    assert list(engine.side._by_key) == ["alive/1"]


def test_tokens_in_flight_are_not_taken_back(engine: Engine) -> None:
    from ares.engine.control import Abandoned

    engine.side._channel.gone["dead"] = 0.0
    request = engine.add("dead/1", 10)
    request.num_output_placeholders = 1
    request.num_computed_tokens = request.num_tokens
    engine.carry_out(Abandoned("dead"), "dead/1")
    assert engine.goes_on(request)
    assert not engine.goes_on(request)


def test_a_gateway_that_is_back_keeps_its_requests(engine: Engine) -> None:
    from ares.engine.control import Abandoned

    request = engine.add("back/1", 10)
    engine.carry_out(Abandoned("back"), "back/1")
    assert engine.goes_on(request)
    assert request.max_tokens == 50


def test_an_output_that_ends_by_itself_says_so(engine: Engine) -> None:
    from ares.engine.control import Abandoned

    engine.side._channel.gone["dead"] = 0.0
    request = engine.add("dead/1", 10)
    request.sampling_params.update_from_generation_config({}, EOS)
    last = engine.add("dead/2", 49)
    engine.carry_out(Abandoned("dead"), "dead/1", "dead/2")
    assert not engine.goes_on(request, EOS)
    assert not engine.goes_on(last)
    assert request.stop_reason is last.stop_reason is None


def test_a_prefill_that_nobody_waits_for_is_not_pinned(engine: Engine) -> None:
    from ares.engine.control import Abandoned

    engine.side._channel.gone["dead"] = 0.0
    prefill = engine.add("dead/1", 0, do_remote_decode=True, do_remote_prefill=False)
    prefill.max_tokens = 1
    engine.carry_out(Abandoned("dead"), "dead/1")
    assert not engine.goes_on(prefill)
    assert engine.side._pinned == {}
    assert engine.side._reqs_not_processed == {"dead/1"}
