"""The whole learner over fake instances: from a cold start to a champion, a drift, and back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ares.engine.learning.recorded_shards import RecordedShards
from ares.learner import commands
from ares.learner.errors import LearnerError
from ares.learner.folder import Folder
from ares.learner.learning import Learning
from ares.learner.service import Learner
from ares.learner.settings import Keys, LearnerSettings
from ares.learner.work import Planner
from ares.models.resolve import DEFAULT_MODEL
from ares.protocol import messages
from tests.learner import synthetic
from tests.learner.fakes import Gateway, Instance, serving
from tests.learner.job_processes import children
from tests.learner.shipped_version import version_for
from tests.waiting import eventually

QUICK = {
    "first_outputs": 100,
    "pause_s": 0.1,
    "epochs": 25,
    "looks": [60, 120, 240],
    "growth": 10.0,
    "window_outputs": 260,
    "window_fewest": 200,
    "check_outputs": 80,
    "nice": 0,
    "take_s": 0.05,
    "find_s": 0.2,
    "report_s": 0.2,
    "retry_s": 0.5,
}

# A job starts a process that imports torch, on a machine that does other work.
JOBS_S = 120.0


@contextlib.asynccontextmanager
async def running(settings: LearnerSettings) -> AsyncIterator[Learner]:
    with Folder(settings.folder).locked():
        learner = Learner(settings, Keys())
        task = asyncio.create_task(learner.run())
        try:
            yield learner
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def record(at: Instance, folder: Path, count: int, seed: int, meaning: float = 1.0) -> None:
    """Let an instance offer outputs, in shards of 20."""
    made = synthetic.outputs(count, seed, meaning)
    for first in range(0, count, 20):
        at.offer(synthetic.shard(folder, made[first : first + 20]))


def events(learner: Learner) -> list[str]:
    return [event["event"] for event in learner.learning.history.events]


async def test_from_a_cold_start_through_a_drift(tmp_path: Path) -> None:
    gateway, first, second = Gateway(), Instance(tmp_path), Instance(tmp_path, "decode-1")
    async with gateway.serving(), serving(first), serving(second):
        gateway.instances = [first]
        settings = LearnerSettings(folder=tmp_path / "learner", gateways=[gateway.url], **QUICK)
        async with running(settings) as learner:
            record(first, tmp_path, 120, seed=1)
            await eventually(lambda: "trained" in events(learner), JOBS_S)
            assert first.predictor == ""
            record(first, tmp_path, 80, seed=2)
            await eventually(lambda: "promoted" in events(learner), JOBS_S)
            champion = learner.learning.state.champion
            await eventually(lambda: first.predictor == champion)
            gateway.instances = [first, second]  # one that joins later
            await eventually(lambda: second.predictor == champion)

            record(second, tmp_path, 260, seed=3, meaning=-1.0)
            await eventually(lambda: "demoted" in events(learner), JOBS_S)
            await eventually(lambda: first.predictor == second.predictor == "")
            await eventually(lambda: events(learner).count("trained") == 2, JOBS_S)
            await eventually(lambda: gateway.reports[-1]["challenger"] is not None)
        report = gateway.reports[-1]
        assert report["champion"]["kind"] == "curve"
        assert report["challenger"]["version"] not in ("", champion)
        assert report["instances"] == {"decode-0": "", "decode-1": ""}
        assert [event["event"] for event in report["events"]] == ["trained", "promoted", "demoted", "trained"]
        assert report["losses"]
        # All that is stored has been named back, and is deleted at the instances.
        assert first.waiting == second.waiting == 0


async def test_poisoned_shards_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    poisoned = Instance(tmp_path)
    made = synthetic.outputs(3, seed=1)
    made[0].states[0][3] = float("nan")
    long = synthetic.output("long", 20, np.random.default_rng(0))
    long.prompt_tokens = [1] * synthetic.CONTEXT
    wrong = {
        "not finite": synthetic.shard(tmp_path, made[:1]),
        "another model": synthetic.shard(tmp_path, made[1:2], synthetic.source(model="another/model")),
        "another interval": synthetic.shard(tmp_path, made[1:2], synthetic.source(every=7)),
        "longer than the model's context": synthetic.shard(tmp_path, [long]),
        "malformed": b"garbage",
    }
    async with serving(poisoned):
        record(poisoned, tmp_path, 20, seed=2)
        for data in wrong.values():
            poisoned.offer(data)
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[poisoned.url], **QUICK)
        async with running(settings) as learner:
            await eventually(lambda: not poisoned.waiting)
            assert learner.learning.store.dropped == dict.fromkeys(wrong, 1)
            assert len(learner.learning.store.outputs) == 20
    assert "one every 20 tokens: start the instances so, or a learner with another --folder" in caplog.text
    # They are not there after a restart either.
    async with serving(poisoned), running(settings) as learner:
        assert len(learner.learning.store.outputs) == 20
        assert not learner.learning.store.dropped


@pytest.mark.parametrize("by", ["refuses", "worker_refuses"])
async def test_a_refusal_is_one_event_and_is_tried_again(tmp_path: Path, by: str) -> None:
    version = version_for(DEFAULT_MODEL)
    refusing, other = Instance(tmp_path, "refusing"), Instance(tmp_path, "shipped", predictor=version)
    setattr(refusing, by, "another learner sends to it")
    async with serving(refusing), serving(other):
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[refusing.url, other.url], **QUICK)
        async with running(settings) as learner:
            # A new folder: the checkpoint that an instance was started with is the first champion.
            await eventually(lambda: learner.learning.state.champion == version)
            await eventually(lambda: "refused" in events(learner))
            await asyncio.sleep(1.2)
            assert events(learner).count("refused") == 1
            setattr(refusing, by, "")
            await eventually(lambda: refusing.predictor == version)
        assert not other.received


async def test_instances_that_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    earlier, unknown = Instance(tmp_path, "earlier", learns=False), Instance(tmp_path, "unknown", predictor="ab" * 32)
    record(earlier, tmp_path, 20, seed=1)
    record(unknown, tmp_path, 20, seed=2)
    async with serving(earlier), serving(unknown):
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[earlier.url, unknown.url], **QUICK)
        async with running(settings) as learner:
            await eventually(lambda: not unknown.waiting)
            await eventually(lambda: "does not know" in caplog.text and "left alone" in caplog.text)
            assert len(learner.learning.store.outputs) == 20
    assert earlier.waiting == 1
    assert unknown.predictor == "ab" * 32
    assert caplog.text.count("earlier: it does not take part in learning") == 1


async def test_commands_of_the_operator_reach_a_running_learner(tmp_path: Path) -> None:
    version = version_for(DEFAULT_MODEL)
    started = Instance(tmp_path, predictor=version)
    folder = Folder(tmp_path / "learner")
    async with serving(started):
        settings = LearnerSettings(folder=folder.path, workers=[started.url], **QUICK)
        async with running(settings) as learner:
            await eventually(lambda: learner.learning.state.champion == version)
            done = await asyncio.to_thread(commands.carry_out, folder, commands.Command(command="rollback"))
            assert "residual-life curve" in done
            await eventually(lambda: started.predictor == "")
            again = commands.Command(command="rollback", version=version[:10])
            await asyncio.to_thread(commands.carry_out, folder, again)
            await eventually(lambda: started.predictor == version)
            await asyncio.to_thread(commands.carry_out, folder, commands.Command(command="freeze"))
            assert learner.doing == "frozen"
            with pytest.raises(LearnerError, match="none of the versions"):
                await asyncio.to_thread(commands.carry_out, folder, commands.Command(command="rollback", version="99"))


async def test_an_instance_that_restarts_gets_the_champion_again(tmp_path: Path) -> None:
    version = version_for(DEFAULT_MODEL)
    shipped, restarted = Instance(tmp_path, "shipped", predictor=version), Instance(tmp_path, "restarted")
    gateway = Gateway()
    async with serving(shipped), gateway.serving():
        gateways = [gateway.url, "http://127.0.0.1:9"]  # nothing answers at the second one
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[shipped.url], gateways=gateways, **QUICK)
        async with running(settings):
            gateway.instances = [restarted]
            async with serving(restarted):
                await eventually(lambda: restarted.predictor == version)
            restarted.boot, restarted.predictor = "after the restart", ""
            async with serving(restarted):
                await eventually(lambda: restarted.predictor == version)
    assert restarted.received == [version, version]


async def test_an_error_of_planning_is_an_event_and_the_champion_is_still_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(*_: object) -> None:
        raise AttributeError("unforeseen")

    monkeypatch.setattr(Planner, "next", unforeseen)
    version = version_for(DEFAULT_MODEL)
    started, other = Instance(tmp_path, predictor=version), Instance(tmp_path, "other")
    async with serving(started), serving(other):
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[started.url, other.url], **QUICK)
        async with running(settings) as learner:
            await eventually(lambda: other.predictor == version)
            await eventually(lambda: "error" in events(learner))
            await asyncio.sleep(1.5)
            assert events(learner).count("error") == 1


async def test_a_damaged_champion_is_given_up_when_it_is_to_be_sent(tmp_path: Path) -> None:
    version = version_for(DEFAULT_MODEL)
    started = Instance(tmp_path, predictor=version)
    other = Instance(tmp_path, "other")
    gateway = Gateway()
    async with serving(started), gateway.serving(), serving(other):
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[started.url], gateways=[gateway.url], **QUICK)
        async with running(settings) as learner:
            await eventually(lambda: learner.learning.state.champion == version)
            learner.learning.versions.path(version).write_bytes(b"")
            gateway.instances = [other]
            # It is copied again from what ships, since an instance runs it.
            await eventually(lambda: other.predictor == version)
            assert "error" in events(learner)


async def test_a_second_learner_gets_no_data_and_replaces_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = version_for(DEFAULT_MODEL)
    shared, own = Instance(tmp_path, "shared"), Instance(tmp_path, "own", predictor=version)
    async with serving(shared), serving(own):
        first = LearnerSettings(folder=tmp_path / "first", workers=[shared.url], **QUICK)
        second = LearnerSettings(folder=tmp_path / "second", workers=[shared.url, own.url], **QUICK)
        async with running(first) as one:
            record(shared, tmp_path, 40, seed=1)
            await eventually(lambda: not shared.waiting)
            async with running(second) as other:
                await eventually(lambda: other.learning.state.champion == version)
                record(shared, tmp_path, 60, seed=2)
                await eventually(lambda: not shared.waiting)
                await asyncio.sleep(1.5)
                assert not other.learning.store.outputs
                assert not shared.received
            assert len(one.learning.store.outputs) == 100
            assert caplog.text.count(f"belongs to learner {one.learning.state.name}: stop one of the two") == 1


def test_an_instance_of_an_earlier_version_says_nothing_of_refusals() -> None:
    encoded = msgspec.msgpack.encode({"type": "recorded", "call": 1})
    assert msgspec.msgpack.decode(encoded, type=messages.Recorded) == messages.Recorded(1)


async def test_an_instance_that_cannot_delete_is_not_asked_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an earlier version hands the same shards over again."""
    asked = 0

    def again(shards: RecordedShards, command: messages.TakeRecorded) -> messages.Recorded:
        nonlocal asked
        asked += 1
        return messages.Recorded(command.call, f"part-{asked % 2:012d}-00000000.safetensors", data[asked % 2])

    data = [synthetic.shard(tmp_path, synthetic.outputs(2, seed)) for seed in (1, 2)]
    monkeypatch.setattr(RecordedShards, "take", again)
    instance = Instance(tmp_path)
    async with serving(instance):
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[instance.url], **QUICK | {"take_s": 0.5})
        async with running(settings) as learner:
            await eventually(lambda: len(learner.learning.store.outputs) == 4)
            await asyncio.sleep(1.5)
            assert asked <= 2 + 4


async def test_a_freeze_ends_a_training_that_runs(tmp_path: Path) -> None:
    instance, folder = Instance(tmp_path), Folder(tmp_path / "learner")
    record(instance, tmp_path, 120, seed=1)
    async with serving(instance):
        settings = LearnerSettings(folder=folder.path, workers=[instance.url], **QUICK | {"epochs": 100_000})
        async with running(settings) as learner:
            await eventually(lambda: learner.doing == "training")
            await asyncio.to_thread(commands.carry_out, folder, commands.Command(command="freeze"))
            await eventually(lambda: learner.doing == "frozen")
            await eventually(lambda: not children())
            await asyncio.to_thread(commands.carry_out, folder, commands.Command(command="unfreeze"))
            await eventually(lambda: learner.doing == "training")
            assert events(learner) == ["frozen", "unfrozen"]


async def test_a_result_that_cannot_be_used_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unforeseen(*_: object) -> None:
        raise AttributeError("unforeseen")

    monkeypatch.setattr(Learning, "done", unforeseen)
    instance = Instance(tmp_path)
    record(instance, tmp_path, 120, seed=1)
    async with serving(instance):
        settings = LearnerSettings(folder=tmp_path / "learner", workers=[instance.url], **QUICK | {"epochs": 1})
        async with running(settings) as learner:
            await eventually(lambda: events(learner)[:2] == ["error", "error"], JOBS_S)  # it is tried again
            assert "unforeseen" in learner.learning.history.events[0]["text"]
