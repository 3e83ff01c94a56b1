"""The scheduler side without an engine: vLLM's own requests and stop check, and gateways on the control channel."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ares.engine import identity
from ares.protocol import messages, rpc
from tests.engine.control_channel import Gateway, free_address, until
from tests.engine.test_configuration import config as described

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

PROMPT = [5, 6, 7]
EOS = 2
BLOCK = 16


def configuration(*, asynchronous: bool = False) -> tuple[Any, Any]:
    """What the scheduler side reads of vLLM's configuration and KV cache: one GPU, one kind of cache."""
    from vllm.config import KVTransferConfig

    config = described(v2=False, asynchronous=asynchronous)
    vars(config).update(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_index=0,
        ),
        kv_transfer_config=KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both"),
        device_config=SimpleNamespace(device_type="cpu"),
        structured_outputs_config=SimpleNamespace(reasoning_parser=""),
        num_prefill_lookahead_tokens=1,
        kv_events_config=None,
    )
    vars(config.model_config).update(max_model_len=4096)
    vars(config.cache_config).update(block_size=BLOCK, enable_prefix_caching=True, cache_dtype="auto")
    vars(config.scheduler_config).update(
        disable_hybrid_kv_cache_manager=True, max_num_seqs=8, max_num_batched_tokens=512
    )
    spec = SimpleNamespace(block_size=BLOCK, prefix_replay_tokens=0)
    group = SimpleNamespace(kv_cache_spec=spec, host_resident=False)
    cache = SimpleNamespace(
        kv_cache_groups=[group],
        transfer_groups=[group],
        has_mamba_layers=False,
        kv_cache_tensors=[SimpleNamespace(size=100 * BLOCK * 10)],
        num_blocks=100,
        select_transfer_block_ids=lambda block_ids: block_ids,
    )
    return config, cache


class Engine:
    """A scheduler side as vLLM makes it, and the steps of vLLM's scheduler that it sees."""

    def __init__(self, published_host: str = "127.0.0.1", *, asynchronous: bool = False) -> None:
        from ares.engine.connector.scheduler import Scheduler

        self.address = free_address()
        published = self.address.replace("127.0.0.1", published_host)
        identity.export(identity.InstanceSettings("decode-0", "decode", "boot", published, listen_host="127.0.0.1"))
        config, cache = configuration(asynchronous=asynchronous)
        self.side = Scheduler(config, "engine", cache)

    def add(self, key: str, output: int, **params: Any) -> Any:
        """Add a request that has generated so many tokens."""
        from ares.engine.vllm_api import Request, SamplingParams

        arguments = {"max_tokens": 50, "extra_args": {"kv_transfer_params": {"ares_key": key, **params}}}
        request = Request(key, list(PROMPT), SamplingParams(**arguments), None)
        self.side.on_new_request(request)
        request.append_output_token_ids([9] * output)
        request.num_computed_tokens = request.num_tokens - 1
        return request

    def step(self, *scheduled: str) -> Any:
        """Schedule a step with one token for each of these requests; return the metadata for the workers."""
        tokens = dict.fromkeys(scheduled, 1)
        return self.side.build_connector_meta(
            SimpleNamespace(num_scheduled_tokens=tokens, total_num_scheduled_tokens=len(tokens))
        )

    def command(self, *scheduled: str) -> Any:
        """Schedule a step as soon as a command waits for it."""
        until(self.side.has_pending_push_work)
        return self.step(*scheduled)

    def finish(self, request: Any, token: int = 9) -> Any:
        """Give a request a token; return what vLLM is told at its end (pinned, transfer), None where it goes on."""
        from vllm.v1.core.sched.utils import check_stop

        request.num_computed_tokens = request.num_tokens  # the newest token's KV comes with the next step
        request.append_output_token_ids(token)
        return self.side.request_finished(request, ([1, 2],)) if check_stop(request, 4096) else None

    def goes_on(self, request: Any, token: int = 9) -> bool:
        """Give a request a token; whether it goes on. One that ends must not be pinned."""
        ended = self.finish(request, token)
        assert ended is None or not ended[0]
        assert ended is None or "remote_block_ids" not in (ended[1] or {})
        return ended is None

    def visit(self, name: str) -> None:
        """Let a gateway connect and close its connection again."""
        gateway = self.connect(name)
        gateway.close()

    def connect(self, name: str) -> Gateway:
        gateway = Gateway(self.address)
        gateway.send(messages.Subscribe(0.01, name))
        gateway.receive_a(messages.Hello)
        return gateway


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Make an engine; one that schedules asynchronously where the test's parameter is True."""
    monkeypatch.setenv("ARES_INSTANCE", "")
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    monkeypatch.setattr(rpc, "GATEWAY_EXPIRY_S", 0.2)
    made = Engine(asynchronous=getattr(request, "param", False))
    yield made
    made.side.shutdown()


def expire(engine: Engine, name: str, *scheduled: str) -> None:
    """Let a gateway connect, disconnect and stay away, in steps with these requests."""
    engine.visit(name)
    engine.command(*scheduled)
    engine.command(*scheduled)


@pytest.mark.parametrize(
    "key", [5, True, ["gateway/1"], {"gateway": 1}, "k" * 2000], ids=["number", "flag", "list", "object", "long"]
)
def test_a_key_that_no_gateway_gives_is_not_used(engine: Engine, key: Any) -> None:
    """Whoever asks the instance without a gateway must not end it, nor its reports to gateways."""
    request = engine.add("direct", 1, ares_key=key, ares_step_tokens=True)
    engine.step("direct")
    engine.side.step_completed()
    load = engine.side.telemetry()
    assert (load.running + load.waiting, load.rows) == (1, [])
    request.max_tokens = 2
    assert not engine.goes_on(request)
    assert engine.side.telemetry().waiting == 0


def test_requests_of_a_gateway_that_stays_away_end(engine: Engine) -> None:
    running, waiting, other = engine.add("dead/1", 10), engine.add("dead/2", 10), engine.add("alive/1", 10)
    engine.visit("dead")
    engine.command("dead/1", "alive/1")  # it has disconnected
    assert [r.max_tokens for r in (running, waiting, other)] == [50, 50, 50]
    engine.command("dead/1", "alive/1")  # and stays away
    assert not engine.goes_on(running)
    # A request that does not run, for example since it was preempted, ends with its next token.
    assert not engine.goes_on(waiting)
    assert engine.goes_on(other)
    load = engine.side.telemetry()
    assert load.pinned == 0
    assert [row.key for row in load.rows] == ["alive/1"]
    # If its stream is read all the same, it does not look like the end of the output.
    assert running.stop_reason == waiting.stop_reason == "migrated"


def test_tokens_in_flight_are_not_taken_back(engine: Engine) -> None:
    request = engine.add("dead/1", 10)
    request.num_output_placeholders = 1
    request.num_computed_tokens = request.num_tokens
    expire(engine, "dead", "dead/1")
    assert engine.goes_on(request)
    assert not engine.goes_on(request)


def test_a_gateway_that_is_back_keeps_its_requests(engine: Engine) -> None:
    request = engine.add("back/1", 10)
    engine.visit("back")
    engine.command("back/1")
    until(engine.side.has_pending_push_work)  # it has expired, and connects again before the next step
    back = engine.connect("back")
    engine.step("back/1")
    assert engine.goes_on(request)
    assert request.max_tokens == 50
    back.close()


def test_an_output_that_ends_by_itself_says_so(engine: Engine) -> None:
    request = engine.add("dead/1", 10)
    request.sampling_params.update_from_generation_config({}, EOS)
    last = engine.add("dead/2", 49)
    expire(engine, "dead", "dead/1", "dead/2")
    assert not engine.goes_on(request, EOS)
    assert not engine.goes_on(last)
    assert request.stop_reason is last.stop_reason is None


def test_a_prefill_of_a_gateway_that_stays_away_is_not_pinned(engine: Engine) -> None:
    prefill = engine.add("dead/1", 0, do_remote_decode=True, do_remote_prefill=False)
    prefill.max_tokens = 1
    expire(engine, "dead", "dead/1")
    assert not engine.goes_on(prefill)
    assert engine.side.telemetry().pinned == 0
    assert engine.step().reqs_not_processed == {"dead/1"}


@pytest.mark.parametrize("params", [{}, {"do_remote_decode": True, "do_remote_prefill": False}])
def test_a_prefill_says_what_was_cached(engine: Engine, params: dict[str, Any]) -> None:
    prefill = engine.add("gateway/1", 0, **params)
    prefill.max_tokens = 1
    for cached in (4, 8):  # it was preempted between them: what it had computed itself is cached then
        engine.side.get_num_new_matched_tokens(prefill, cached)
    pinned, transfer = engine.finish(prefill)
    assert (pinned, transfer["ares_cached_tokens"]) == (bool(params), 4)


def test_a_cut_request_is_pinned_until_its_release(engine: Engine) -> None:
    request = engine.add("gateway/1", 10)
    gateway = engine.connect("gateway")
    gateway.send(messages.Cut(7, "gateway/1"))
    # The workers know of it before it ends: with asynchronous scheduling a target may pull before their next step, and
    # they forget the pull of a request that they do not know.
    assert engine.command("gateway/1").reqs_in_batch == {request.request_id}
    pinned, transfer = engine.finish(request, 4)
    assert pinned
    assert request.stop_reason == "migrated"
    answer = gateway.receive_a(messages.CutResult)
    assert (answer.call, answer.outcome, answer.output_tokens, answer.tail[-2:]) == (7, "pinned", 11, [9, 4])
    assert answer.kv_transfer_params["remote_num_tokens"] == transfer["remote_num_tokens"] == len(PROMPT) + 10
    assert engine.side.telemetry().pinned == 1
    gateway.send(messages.Release("gateway/1"))
    assert engine.command().release == {request.request_id}
    gateway.close()


@pytest.mark.parametrize(("engine", "steps"), [(False, 0), (True, 2)], indirect=["engine"])
def test_a_copy_is_answered_when_the_workers_know_of_it(engine: Engine, steps: int) -> None:
    """With asynchronous scheduling they hear of it one step later, and would drop the word of a pull before that."""
    from ares.engine.vllm_api import RequestStatus

    request = engine.add("gateway/1", 30)
    request.status = RequestStatus.RUNNING
    blocks = [SimpleNamespace(block_id=number, is_null=False) for number in (1, 2, 3)]
    pool = SimpleNamespace(touch=lambda _: None, num_gpu_blocks=100, get_num_free_blocks=lambda: 99)
    engine.side.kv_cache_manager = SimpleNamespace(
        block_pool=pool, get_blocks=lambda _: SimpleNamespace(blocks=[blocks])
    )
    gateway = engine.connect("gateway")
    gateway.send(messages.Copy(7, "gateway/1", "gateway/1/copy-1", 32))
    known = engine.command("gateway/1").reqs_in_batch
    assert len(known) == 1
    for _ in range(steps):
        assert not any(isinstance(event, messages.CopyResult) for event in gateway.received(0.1))
        assert engine.side.has_pending_push_work()
        engine.step("gateway/1")
    answer = gateway.receive_a(messages.CopyResult)
    assert (answer.call, answer.tokens) == (7, 32)
    gateway.close()


def test_the_workers_forget_a_cut_request_that_ends_by_itself(engine: Engine) -> None:
    request = engine.add("gateway/1", 10)
    request.sampling_params.update_from_generation_config({}, EOS)
    gateway = engine.connect("gateway")
    gateway.send(messages.Cut(7, "gateway/1"))
    engine.command("gateway/1")
    assert not engine.goes_on(request, EOS)
    assert engine.step().reqs_not_processed == {request.request_id}
    gateway.close()


@pytest.mark.parametrize(("token", "minimum", "outcome"), [(9, 11, "finished"), (4, 11, "pinned"), (9, 12, "pinned")])
def test_a_cut_at_the_token_that_completes_a_repetition(engine: Engine, token: int, minimum: int, outcome: str) -> None:
    """vLLM looks at the limit first, and does not look for repetitions below `min_tokens`."""
    from vllm.sampling_params import RepetitionDetectionParams

    request = engine.add("gateway/1", 10)
    detection = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=11)
    request.sampling_params.repetition_detection, request.sampling_params.min_tokens = detection, minimum
    gateway = engine.connect("gateway")
    gateway.send(messages.Cut(7, "gateway/1"))
    engine.command("gateway/1")
    assert engine.finish(request, token)[0] is (outcome == "pinned")
    assert request.stop_reason == ("migrated" if outcome == "pinned" else "repetition_detected")
    assert gateway.receive_a(messages.CutResult).outcome == outcome
    gateway.close()


def test_a_resumed_request_whose_prefill_completes_a_repetition(engine: Engine) -> None:
    """It was suspended one token before its end: no instance is to pull its KV."""
    from vllm.sampling_params import RepetitionDetectionParams

    prefill = engine.add("gateway/1", 10, do_remote_decode=True, do_remote_prefill=False)
    prefill.max_tokens = 11
    prefill.sampling_params.repetition_detection = RepetitionDetectionParams(max_pattern_size=1, min_count=11)
    assert not engine.goes_on(prefill)
    assert prefill.stop_reason == "repetition_detected"
    assert engine.side.telemetry().pinned == 0


def test_the_pins_of_a_gateway_that_disconnects_are_orphaned(engine: Engine) -> None:
    prefill = engine.add("dead/1", 0, do_remote_decode=True)
    prefill.max_tokens = 1
    gateway = engine.connect("dead")
    engine.step("dead/1")
    assert engine.finish(prefill)[0]
    gateway.close()
    assert engine.command().orphaned == {prefill.request_id}
    # Likewise a request that ends after that.
    late = engine.add("dead/2", 0, do_remote_decode=True)
    late.max_tokens = 1
    assert engine.finish(late)[0]
    assert engine.step().orphaned == {late.request_id}


@pytest.mark.parametrize("token", [9, EOS])
def test_a_prefill_whose_prompt_is_shortened_says_that_its_token_is_not_the_first(
    monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    """Multi-token prediction by three modules: vLLM leaves the last two tokens of the prompt to decode."""
    monkeypatch.setenv("ARES_INSTANCE", "")
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    engine = Engine()
    engine.side.vllm_config.num_prefill_lookahead_tokens = 3
    prefill = engine.add("gateway/1", 0, do_remote_decode=True)
    prefill.sampling_params.update_from_generation_config({}, EOS)
    assert prefill.num_prompt_tokens == len(PROMPT) - 2
    pinned, transfer = engine.finish(prefill, token)
    # Pinned also where the token looks like the end of the output.
    assert pinned
    assert transfer["ares_prompt_shortened"] is True
    assert transfer["remote_num_tokens"] == len(PROMPT) - 2
    engine.side.shutdown()
