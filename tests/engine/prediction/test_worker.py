"""When running requests are predicted, without an engine: the steps come from here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

HIDDEN, EVERY = 8, 20


class Bench:
    """A live predictor, and how many rows each of its predictions had."""

    def __init__(self, slots: int = 64, first: int = 0) -> None:
        from ares.engine.prediction import live_predictor as predicting
        from tests.predictor.checkpoints import random_checkpoint

        loaded = random_checkpoint("m", HIDDEN, every=EVERY, first=first)
        self.batches: list[int] = []
        test = self

        class CountingPredictor(predicting.Predictor):
            def predict(self, slots: Any, *rest: Any) -> Any:
                test.batches.append(len(slots))
                return super().predict(slots, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predicting, "Predictor", CountingPredictor)
            self.live = predicting.LivePredictor(loaded, slots, "cpu", EVERY)
        self.pending = predicting.PENDING
        self.pending.clear()

    def step(self, requests: list[Any], states: Any = None, finished: list[Any] | None = None) -> None:
        import torch

        from ares.engine.prediction.hidden_states import Step

        for request in requests:
            request.position += 1
        rows = torch.ones(len(requests), HIDDEN) if states is None else states
        self.live.step(Step(requests, rows if requests else None, finished or []))


def request(name: str, position: int = -1, **params: Any) -> Any:
    from ares.engine.prediction.hidden_states import HookedRequest

    return HookedRequest(name, [1, 2, 3], SimpleNamespace(extra_args={"kv_transfer_params": params}), position, [])


def test_new_requests_are_predicted_together_and_soon() -> None:
    bench, running, predicted = Bench(), [], []
    for n in range(EVERY - 1):
        running.append(request(f"r{n}"))
        bench.step(running)
        predicted.append(len(bench.pending))
    # None waits for five steps, and one call brings all that are new.
    assert all(begun - done < 5 for begun, done in enumerate(predicted, 1))
    assert bench.batches == [5, 5, 5]
    bench.step(running)
    assert bench.batches == [5, 5, 5, 19]
    assert {prediction.output_tokens for prediction in bench.pending.values()} == set(range(1, EVERY))


def test_a_prefill_is_predicted_in_its_own_step_with_all_new_requests() -> None:
    bench = Bench()
    decoding, prefill = request("d"), request("p", -3, do_remote_decode=True)
    for _ in range(2):  # two parts of the prompt
        bench.step([decoding, prefill])
    assert not bench.pending
    bench.step([decoding, prefill])
    assert bench.pending.keys() == {"d", "p"}
    assert bench.batches == [2]


def test_a_precopy_is_not_predicted() -> None:
    bench = Bench()
    for _ in range(EVERY):
        bench.step([request("a", ares_ahead=True)])
    assert bench.batches == []


def test_a_request_that_ends_first_is_not_predicted_and_frees_its_slot() -> None:
    import torch

    states = torch.randn(3, 1, HIDDEN)
    fresh = Bench(slots=1)
    other = request("other", -2)
    for _ in range(4):  # it is predicted in the fifth step, when it has generated three tokens
        fresh.step([other], states[0])
    fresh.step([other], states[2])
    expected = fresh.pending["other"]
    bench = Bench(slots=1)
    first, brief, other, waits = (request(name) for name in ("first", "brief", "other", "waits"))
    for n in range(10):
        bench.step([first], states[n % 2])
    bench.step([brief], states[0], finished=[first])
    bench.step([other], states[0], finished=[brief])
    bench.step([other], states[0])
    bench.step([other], states[0])
    bench.step([other, waits], states[2].expand(2, HIDDEN))  # one more than there are slots
    # Nothing of the request that had the slot before is left in it.
    assert bench.pending == {"other": expected}
    assert bench.batches == [1, 1]


def test_a_forecast_from_the_first_state_travels() -> None:
    """Where it came along, a later state is not taken for the first one."""
    import torch

    states = torch.randn(2, 1, HIDDEN)
    prefilled = Bench(first=1)
    prefilled.step([request("p", do_remote_decode=True)], states[0])
    forecast = carried_text(prefilled, "p")

    def predicted(**params: Any) -> Any:
        bench, moved = Bench(first=1), request("d", 90, ares_output_tokens=0, **params)
        for _ in range(5):
            bench.step([moved], states[1])
        return bench.pending["d"]

    without, with_it, with_another = (
        predicted(),
        predicted(ares_first_forecast=forecast),
        predicted(ares_first_forecast="0123456789abcdef" + forecast[16:]),
    )
    assert with_it.remaining != pytest.approx(without.remaining, rel=0.01)
    # One of another checkpoint counts for nothing.
    assert with_another == without


def carried_text(bench: Bench, name: str) -> str:
    from ares.engine.prediction.carried_forecast import encode

    text = encode(bench.pending[name].carried)
    assert text
    return text


@pytest.mark.parametrize("first", [0, 1])
def test_behind_a_move_predictions_go_on_as_if_there_was_none(first: int) -> None:
    """The average of the states travels, and the forecast where there is one; without them predictions differ."""
    import torch

    states = torch.randn(2 * EVERY + 1, 1, HIDDEN)

    def generate(bench: Bench, one: Any, begin: int, end: int) -> None:
        for n in range(begin, end):
            bench.step([one], states[n])

    # It is moved right after a prediction, and the next one is due when it has been on the target for five steps.
    source, one = Bench(first=first), request("a")
    generate(source, one, 0, EVERY)
    text = carried_text(source, "a")
    generate(source, one, EVERY, 2 * EVERY)
    expected = source.pending["a"].remaining

    def target(**params: Any) -> Any:
        bench, moved = Bench(first=first), request("a", one.position - 5, **params)
        generate(bench, moved, 2 * EVERY - 5, 2 * EVERY)
        return bench.pending["a"]

    moved = target(ares_first_forecast=text)
    assert moved.remaining == pytest.approx(expected, rel=0.02)
    assert moved.carried.averaged == source.pending["a"].carried.averaged
    assert moved.carried.position == source.pending["a"].carried.position
    assert target().remaining != pytest.approx(expected, rel=0.02)
    forecast_alone = text.rsplit(":", 2)[0]
    assert target(ares_first_forecast=forecast_alone).remaining != pytest.approx(expected, rel=0.02)


def test_a_prediction_that_is_not_finite_is_dropped() -> None:
    import torch

    bench, good, bad = Bench(), request("good"), request("bad")
    states = torch.ones(2, HIDDEN)
    states[1] = torch.nan
    for _ in range(5):
        bench.step([good, bad], states)
    assert bench.pending.keys() == {"good"}


def make_worker(monkeypatch: pytest.MonkeyPatch, rank: int = 0, **settings: Any) -> Any:
    """Return the worker of an instance with these settings, whose model is loaded; it has no engine."""
    import torch

    from ares.engine import identity
    from ares.engine.prediction.worker import PredictingWorker
    from ares.engine.vllm_api import PlatformWorker

    monkeypatch.setenv("ARES_INSTANCE", "")
    identity.export(identity.InstanceSettings("d", "decode", "boot", "", model="m", **settings))
    monkeypatch.setattr(PlatformWorker, "load_model", lambda _self, **_: None)
    monkeypatch.setattr(PlatformWorker, "compile_or_warm_up_model", lambda _self: None)
    monkeypatch.setattr(PlatformWorker, "shutdown", lambda _self: None)
    worker = PredictingWorker.__new__(PredictingWorker)
    worker.rank, worker.device = rank, torch.device("cpu")
    worker.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        model_config=SimpleNamespace(get_hidden_size=lambda: HIDDEN, max_model_len=256),
    )
    worker.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(compute_logits=None))
    worker.load_model()
    worker.compile_or_warm_up_model()
    return worker


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_a_tensor_parallel_group_records(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks have the same states: each output would be recorded once a rank."""
    import torch

    from ares.engine.prediction.hidden_states import Step
    from ares.predictor import shards

    worker = make_worker(monkeypatch, rank, record_folder=str(tmp_path), record_fraction=1.0)
    running = request("a", 0)
    worker.on_step(Step([running], torch.ones(1, HIDDEN), []))
    running.add_output(0, [7])
    worker.on_step(Step([], None, [running]))
    worker.shutdown()
    assert [shards.read(file).requests for file in shards.files(tmp_path)] == [["a"]] * (rank == 0)
