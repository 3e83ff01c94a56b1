"""What the recorder writes of requests, step by step."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.control_channel import until

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

EVERY, END, HIDDEN = 2, 99, 4
NEVER = 1e6


class Bench:
    """A recorder, and requests whose tokens reach the host `late` steps after they were sampled."""

    def __init__(self, folder: Path, *, sample: Any = None, store: Any = None, late: int = 0, **options: Any) -> None:
        from ares.engine.prediction import recorder
        from ares.engine.prediction.recording_sample import FixedShare
        from ares.predictor.shards import LIVE, Source

        intervals = recorder.Intervals(**{"ended_s": NEVER, "running_s": NEVER, **options.pop("intervals", {})})
        source = Source("model", HIDDEN, EVERY, 100, LIVE)
        self.folder, self.late = folder, late
        self.recorder = recorder.Recorder(
            store or recorder.DataFolder(folder),
            sample or FixedShare(1.0),
            source,
            intervals=intervals,
            **{"token_ids": True, **options},
        )

    def request(self, name: str = "r", before: int = 0, key: str | None = None, **given: Any) -> Any:
        from ares.engine.prediction.hidden_states import HookedRequest

        params = {"ares_key": key, "ares_generated": before, **given.pop("params", {})}
        end = None if given.get("ignore_eos") else END
        sampling = {
            "extra_args": {"kv_transfer_params": params},
            "max_tokens": 50,
            "eos_token_id": end,
            **given,
        }
        return HookedRequest(name, [1, 2, 3, *range(10, 10 + before)], SimpleNamespace(**sampling), -1, [])

    def run(self, request: Any, tokens: list[int], first: int = 0, last: int | None = None) -> None:
        """Run the steps that sample these tokens of an output, from `first` up to `last`."""
        import torch

        from ares.engine.prediction.hidden_states import Step

        for position in range(first, len(tokens) if last is None else last):
            request.position = position
            if position >= self.late:
                request.output_tokens.append(tokens[position - self.late])
            state = float(request.generated_before + position)
            self.recorder.step(Step([request], torch.full((1, HIDDEN), state), []))

    def finish(self, request: Any, tokens: list[int] | None = None) -> None:
        from ares.engine.prediction.hidden_states import Step

        if tokens is not None:
            request.output_tokens[:] = tokens
        self.recorder.step(Step([], None, [request]))

    def pairs(self) -> Any:
        from ares.predictor import dataset

        self.recorder.close()
        return dataset.load(self.folder)

    def written(self) -> list[Any]:
        from ares.predictor import shards

        return [shards.read(file) for file in shards.files(self.folder)]


class FullDisk:
    """A store that fails until there is room."""

    def __init__(self, *, full: bool = True) -> None:
        self.failures = 0
        self.full = full
        self.requests: list[str] = []

    def write(self, _source: Any, outputs: Any, *, token_ids: bool) -> None:
        from ares.predictor.errors import PredictorError

        if self.full:
            self.failures += 1
            raise PredictorError("no space left on device")
        assert token_ids
        self.requests += [output.request for output in outputs]

    def trim(self) -> None:
        pass


def recorded(folder: Path, tokens: list[int], *, late: int, **sampling: Any) -> Any:
    """Record an output, and read it back."""
    bench = Bench(folder, late=late)
    request = bench.request(**sampling)
    bench.run(request, tokens)
    bench.finish(request, tokens)
    return bench.pairs()


@pytest.mark.parametrize("late", [0, 1])
def test_a_complete_output(tmp_path: Path, late: int) -> None:
    pairs = recorded(tmp_path, [5, 6, 7, END], late=late)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, 6, 7, END]]
    assert list(pairs.position) == [0, 2]
    assert pairs.states[:, 0].tolist() == [0, 2]
    assert pairs.outcomes == ("stop",)
    assert not pairs.censored.any()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_what_is_sampled_after_the_stop_token_is_not_output(tmp_path: Path, late: int) -> None:
    """Under asynchronous scheduling a step or two have begun before the stop token is seen."""
    pairs = recorded(tmp_path, [5, 6, END, 8, 9], late=late)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, 6, END]]
    assert list(pairs.position) == [0, 2]
    assert not pairs.censored.any()


def test_an_output_without_a_stop_token_is_censored(tmp_path: Path) -> None:
    pairs = recorded(tmp_path, [5, END, 7], late=1, ignore_eos=True)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, END, 7]]
    assert pairs.outcomes == ("left",)
    assert pairs.censored.all()


def test_drafts_beyond_the_limit_are_not_output(tmp_path: Path) -> None:
    """A step may accept more drafts than the output has room for; vLLM drops the rest."""
    pairs = recorded(tmp_path, [5, 6, 7, 8, 9], late=1, max_tokens=3)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, 6, 7]]
    assert list(pairs.position) == [0, 2]
    assert pairs.outcomes == ("limit",)
    assert pairs.censored.all()


def test_the_limit_is_that_of_the_whole_output_within_the_context(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    # vLLM counts output that was resumed.
    resumed = bench.request("c", params={"ares_generated": 3, "ares_output": [7, 8, 9]}, max_tokens=23)
    others = [bench.request(name, before, max_tokens=limit) for name, before, limit in (("a", 4, 20), ("b", 0, 1000))]
    for request in (*others, resumed):
        bench.run(request, [5, 6, 7])
        bench.finish(request)
    pairs = bench.pairs()
    assert dict(zip(pairs.requests, pairs.limits.tolist(), strict=True)) == {"a": 24, "b": 97, "c": 23}


def test_pieces_of_one_request_on_several_instances_join(tmp_path: Path) -> None:
    """Prefill, a decode instance that it leaves, another one on which it ends: the keys differ in their last part."""
    prefill, first, second = (Bench(tmp_path) for _ in range(3))
    request = prefill.request("p", key="gateway/abc/1", max_tokens=1, params={"do_remote_decode": True})
    prefill.run(request, [10])
    prefill.finish(request)
    prefill.recorder.close()
    request = first.request("d0", 1, key="gateway/abc/2", max_tokens=40)
    first.run(request, [11, 12, 13])
    first.finish(request)
    first.recorder.close()
    request = second.request("d1", 4, key="gateway/abc/3", max_tokens=37)
    second.run(request, [14, 15, END])
    second.finish(request)
    pairs = second.pairs()
    assert pairs.requests == ("gateway/abc",)
    assert list(pairs.position) == [0, 2, 4, 6]
    assert pairs.states[:, 0].tolist() == [0, 2, 4, 6]
    assert list(pairs.remaining) == [7, 5, 3, 1]
    assert pairs.outcomes == ("stop",)
    assert pairs.limits.tolist() == [41]
    assert len(pairs.pair_prompts) == 1


def test_a_running_output_is_written_in_pieces(tmp_path: Path) -> None:
    bench = Bench(tmp_path, late=1, intervals={"ended_s": 0.01, "running_s": 0.01})
    request = bench.request(max_tokens=60)
    tokens = [*range(101, 110), END]
    bench.run(request, tokens, last=5)
    until(lambda: bool(bench.written()))
    shard = bench.written()[0]
    assert shard.outcomes == ["running"]
    # The state at position 4 waits for its token.
    assert shard.tensors["position"].tolist() == [0, 2]
    assert shard.tensors["output_length"].tolist() == [4]
    bench.run(request, tokens, first=5)
    bench.finish(request, tokens)
    pairs = bench.pairs()
    assert list(pairs.position) == [0, 2, 4, 6, 8]
    assert pairs.states[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert pairs.outcomes == ("stop",)
    written = [position for shard in bench.written() for position in shard.tensors["position"].tolist()]
    assert sorted(written) == [0, 2, 4, 6, 8]  # each once


def test_first_pieces_are_in_the_order_in_which_outputs_began(tmp_path: Path) -> None:
    """A learner leaves out what began after an output that still runs: short ones would be over-represented."""
    store = FullDisk(full=False)
    bench = Bench(tmp_path, store=store, intervals={"ended_s": 0.1})
    long, short, brief = (bench.request(name, before=1) for name in ("long", "short", "brief"))
    bench.run(long, [5])
    bench.run(short, [5, END])
    bench.finish(short)
    bench.run(brief, [END])
    bench.finish(brief)
    until(lambda: "brief" in store.requests)
    bench.run(long, [5, END], first=1)
    bench.finish(long)
    bench.recorder.close()
    assert list(dict.fromkeys(store.requests)) == ["long", "short", "brief"]
    assert store.requests[-1] == "long"


def test_an_output_that_runs_when_the_instance_ends_has_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    request = bench.request()
    bench.run(request, [5, 6, 7])
    assert bench.pairs().outcomes == ("left",)


def test_without_token_ids(tmp_path: Path) -> None:
    bench = Bench(tmp_path, token_ids=False)
    request = bench.request()
    bench.run(request, [5, 6, END])
    bench.finish(request)
    pairs = bench.pairs()
    assert list(pairs.remaining) == [3, 1]
    assert list(pairs.prompt_length) == [3, 3]
    assert not any(len(tokens) for tokens in (*pairs.output_tokens, *pairs.prompt_tokens))


def test_a_request_that_found_no_room_when_it_arrived_is_not_recorded_later(tmp_path: Path) -> None:
    """To take those that still run when room appears would take the long ones."""
    from ares.engine.prediction.recording_sample import AtOnce

    bench = Bench(tmp_path, sample=AtOnce(1))
    first, second, third = (bench.request(name) for name in "abc")
    bench.run(first, [5, 6])
    bench.run(second, [5, 6])
    bench.finish(first)
    bench.run(second, [5, 6, 7, 8, 9, 10], first=2)
    bench.run(third, [5, END])
    bench.finish(second)
    bench.finish(third)
    assert bench.pairs().requests == ("a", "c")


def test_a_full_disk_pauses_the_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = FullDisk()
    bench = Bench(tmp_path, store=disk, intervals={"ended_s": 0.01, "pause_s": 0.5})
    request = bench.request("lost")
    bench.run(request, [5, END])
    bench.finish(request)
    until(lambda: disk.failures > 0)
    running = bench.request("arrived in the pause")
    bench.run(running, [5, 6])
    disk.full = False
    time.sleep(0.6)
    bench.run(running, [5, 6, 7, 8], first=2)
    fresh = bench.request("after it")
    bench.run(fresh, [5, END])
    bench.finish(fresh)
    bench.finish(running)
    bench.recorder.close()
    assert disk.requests == ["after it"]
    assert sum("recording pauses" in message for message in caplog.messages) == 1


class LateCopies:
    """States that reach the host when the next copy is begun, as on a GPU that is busy."""

    def __init__(self) -> None:
        self.sent = self.arrived = 0
        self._waiting: list[Any] = []

    def send(self, states: Any, rows: list[int], note: Any) -> None:
        from ares.predictor.shards import half

        self.sent += 1
        self._waiting.append((half(states[rows].numpy()), note))

    def take(self, *, wait: bool = False) -> list[Any]:
        found, self._waiting = (self._waiting, []) if wait else (self._waiting[:-1], self._waiting[-1:])
        self.arrived += len(found)
        return found


def test_an_output_ends_when_its_states_have_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ares.engine.prediction import recorder

    monkeypatch.setattr(recorder, "StateCopies", LateCopies)
    bench = Bench(tmp_path)
    first, second = bench.request("a"), bench.request("b")
    bench.run(first, [5, 6, END])
    bench.finish(first)
    bench.run(second, [5, 6, END])
    bench.finish(second)
    pairs = bench.pairs()
    assert list(pairs.position) == [0, 2, 0, 2]
    assert pairs.states[:, 0].tolist() == [0, 2, 0, 2]
    assert pairs.outcomes == ("stop", "stop")
