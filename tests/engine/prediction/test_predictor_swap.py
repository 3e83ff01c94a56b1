"""A new checkpoint takes over between two steps, or is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ares.engine.learning.folder import LearningFolder, Predicting, version_of
from tests.engine.control_channel import until

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

HIDDEN = 8


class Bench:
    """A learning folder, and checkpoints that arrive in it."""

    def __init__(self, path: Path) -> None:
        self.folder = LearningFolder(path / "learning")
        self.folder.prepare()
        self._files = path / "files"

    def checkpoint(self, seed: int, model: str = "m", hidden_size: int = HIDDEN) -> Path:
        from ares.predictor.checkpoint import save
        from tests.predictor.checkpoints import random_checkpoint

        file = self._files / f"{model}-{hidden_size}-{seed}.safetensors"
        save(file, random_checkpoint(model, hidden_size, seed=seed))
        return file

    def arrives(self, file: Path) -> str:
        version = version_of(file)
        shutil.copy(file, self.folder.incoming(version))
        self.folder.order(version)
        return version

    def refused(self, version: str) -> str:
        """Return why a version was refused; empty where it was not."""
        predicting = self.folder.predicting()
        return predicting.refused[1] if predicting is not None and predicting.refused[0] == version else ""

    def predicts(self, version: str) -> bool:
        predicting = self.folder.predicting()
        return predicting is not None and predicting.version == version


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def make_swap(bench: Bench, version: str = "") -> Any:
    from ares.engine.prediction.live_predictor import LivePredictor
    from ares.engine.prediction.predictor_swap import PredictorSwap
    from ares.predictor import checkpoint
    from ares.predictor.shards import HIDDEN_STATE

    def load(file: Path) -> LivePredictor:
        loaded = checkpoint.load(file)
        loaded.check("m", HIDDEN, HIDDEN_STATE)
        return LivePredictor(loaded, 4, "cpu", 20)

    return PredictorSwap(bench.folder, load, version)


def test_an_accepted_checkpoint_is_taken_once_reported_and_kept(bench: Bench) -> None:
    swap = make_swap(bench)
    swap.look()
    assert bench.folder.predicting() == Predicting()
    assert swap.take() is None
    file = bench.checkpoint(1)
    version = bench.arrives(file)
    swap.look()
    assert bench.folder.predicting() == Predicting(version)
    assert bench.folder.accepted.read_bytes() == file.read_bytes()
    assert not bench.folder.ended.exists()
    assert not bench.folder.incoming(version).exists()
    assert swap.take().live is not None
    swap.look()
    assert swap.take() is None


def test_a_broken_file_changes_nothing(bench: Bench) -> None:
    swap = make_swap(bench)
    good = bench.arrives(bench.checkpoint(1))
    swap.look()
    swap.take()
    kept = bench.folder.accepted.read_bytes()
    truncated = bench.checkpoint(2)
    truncated.write_bytes(truncated.read_bytes()[:-10])
    changed = bench.checkpoint(3)
    for file, reason in (
        (truncated, "not a whole checkpoint"),
        (bench.checkpoint(4, model="other"), "was trained for model other, here m"),
        (bench.checkpoint(5, hidden_size=4), "hidden size 4, here 8"),
    ):
        version = bench.arrives(file)
        swap.look()
        assert reason in bench.refused(version)
        assert "\n" not in bench.refused(version)
        assert str(bench.folder.path) not in bench.refused(version)
        assert not bench.folder.incoming(version).exists()
    version = bench.arrives(changed)
    bench.folder.incoming(version).write_bytes(b"changed on the way")
    swap.look()
    assert "SHA-256" in bench.refused(version)
    assert swap.take() is None
    assert bench.predicts(good)
    assert bench.folder.accepted.read_bytes() == kept


def test_predictions_that_are_not_finite_are_refused(bench: Bench, tmp_path: Path) -> None:
    """All weights are finite, and their products are not."""
    import torch

    from ares.predictor.checkpoint import load, save

    made = load(bench.checkpoint(1))
    member = made.network.members[0]
    with torch.no_grad():
        member.newest.bias.fill_(3e38)
        member.middle.weight.copy_(torch.tensor([6e4, -6e4]).repeat(member.middle.weight.numel() // 2).view(16, 16))
    file = tmp_path / "overflow.safetensors"
    save(file, made)
    swap = make_swap(bench)
    version = bench.arrives(file)
    swap.look()
    assert "predicts values that are not finite" in bench.refused(version)
    assert swap.take() is None


def test_an_empty_version_ends_predictions(bench: Bench) -> None:
    swap = make_swap(bench)
    bench.arrives(bench.checkpoint(1))
    swap.look()
    bench.folder.order("")
    swap.look()
    assert swap.take().live is None
    assert bench.folder.predicting() == Predicting()
    assert not bench.folder.accepted.exists()
    assert bench.folder.ended.exists()


def test_a_refused_version_can_be_sent_again(bench: Bench) -> None:
    swap = make_swap(bench)
    file = bench.checkpoint(1)
    version = version_of(file)
    bench.folder.order(version)  # its file is missing
    swap.look()
    assert bench.refused(version)
    bench.arrives(file)
    swap.look()
    assert bench.folder.predicting() == Predicting(version)


def test_a_predictor_that_fails_while_it_predicts_is_refused(bench: Bench) -> None:
    swap = make_swap(bench, "f" * 64)
    swap.fail()
    swap.look()
    assert bench.predicts("")
    assert "failed while it predicted" in bench.refused("f" * 64)


def test_the_worker_predicts_with_it_from_the_next_step_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for requests that run already; and when predictions end, theirs are taken back."""
    import torch

    from ares.engine.prediction.hidden_states import Step
    from ares.engine.prediction.metadata import PENDING
    from tests.engine.prediction.test_worker import make_worker, request

    worker = make_worker(monkeypatch, learn_folder=str(bench.folder.path))
    PENDING.clear()
    running = request("a")
    steps = iter(range(1000))

    def predicted() -> Any:
        """Run five steps, within which a request that is new to the predictor is predicted."""
        PENDING.clear()
        for position in (next(steps) for _ in range(5)):
            running.position = position
            running.add_output(position, [7])
            worker.on_step(Step([running], torch.ones(1, HIDDEN), []))
        return PENDING.get("a")

    assert predicted() is None
    found = []
    for seed in (1, 2):
        version = bench.arrives(bench.checkpoint(seed))
        until(lambda version=version: bench.predicts(version))
        found.append(predicted().remaining)
    assert found[0] != found[1]
    bench.folder.order("")
    until(lambda: bench.predicts(""))
    predicted()
    assert PENDING == {"a": None}
    worker.shutdown()
    (shard,) = list(bench.folder.recorded.iterdir())
    assert shard.stat().st_size > 0


def test_a_failed_predictor_is_reported_and_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ares.engine.prediction.hidden_states import Step
    from ares.engine.prediction.metadata import PENDING
    from tests.engine.prediction.test_worker import make_worker, request

    file = bench.checkpoint(1)
    worker = make_worker(
        monkeypatch, learn_folder=str(bench.folder.path), predictor=str(file), predictor_version=version_of(file)
    )
    running = request("a")
    for position in range(5):
        running.position = position
        worker.on_step(Step([running], torch.ones(1, HIDDEN), []))
    assert PENDING["a"] is not None
    worker.on_step(Step([SimpleNamespace()], torch.ones(1, HIDDEN), []))  # not a request
    assert PENDING == {"a": None}
    until(lambda: "failed while it predicted" in bench.refused(version_of(file)))
    version = bench.arrives(bench.checkpoint(2))
    until(lambda: bench.predicts(version))
    worker.shutdown()
