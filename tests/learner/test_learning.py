"""The learner's decisions, without processes: results of jobs are made here."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ares.learner import commands, jobs, report
from ares.learner.errors import LearnerError
from ares.learner.folder import Folder
from ares.learner.learning import Learning
from ares.learner.settings import LearnerSettings
from ares.learner.shipped import by_version
from ares.learner.state import CURVE
from ares.learner.trial import CHALLENGER, CHAMPION, Scored
from ares.learner.work import Kind, Work
from ares.models.resolve import DEFAULT_MODEL
from ares.predictor.shards import Outcome
from ares.protocol.learner_report import LARGEST_REPORT_BYTES, Report
from tests.learner import synthetic
from tests.learner.shipped_version import version_for

SETTINGS = {"first_outputs": 100, "looks": [60, 120], "window_outputs": 200, "window_fewest": 100, "pause_s": 1.0}


def opened(folder: Path, **settings: object) -> Learning:
    given = {**SETTINGS, **settings}
    return Learning(Folder(folder), LearnerSettings(folder=folder, workers=["http://a"], **given), {})  # type: ignore[arg-type]


def arrive(learning: Learning, folder: Path, count: int, seed: int, outcome: Outcome | None = None) -> None:
    generator = np.random.default_rng(seed)
    for n in range(0, count, 20):
        made = [synthetic.output(f"{seed}-{n + m}", 60, generator, outcome=outcome) for m in range(20)]
        assert learning.store.take(synthetic.shard(folder, made), synthetic.CONTEXT)


def trained(learning: Learning, work: Work | None, content: bytes) -> str:
    assert work is not None
    assert isinstance(work.job, jobs.Train)
    Path(work.job.checkpoint).write_bytes(content)
    learning.done(work, jobs.Trained(100, 5, 30.0))
    return hashlib.sha256(content).hexdigest()


def judged(learning: Learning, work: Work | None, gain: float) -> None:
    """End a judging in which the network's loss is lower than that of others by `gain` tokens."""
    assert work is not None
    assert isinstance(work.job, jobs.Judge)
    network = dict.fromkeys(work.job.checkpoints, 100.0 - gain)
    if CHALLENGER in network and CHAMPION in network:
        network[CHAMPION] = 100.0
    generator = np.random.default_rng(0)
    scored = [
        Scored(request, 60, 1, {"curve": 100.0} | {role: loss + generator.normal() for role, loss in network.items()})
        for request in work.job.requests
    ]
    learning.done(work, jobs.Judged(scored))


def promoted(tmp_path: Path, content: bytes = b"first", **settings: object) -> tuple[Learning, str]:
    learning = opened(tmp_path / "learner", **settings)
    arrive(learning, tmp_path, 100, 1)
    version = trained(learning, learning.next(), content)
    arrive(learning, tmp_path, 60, 2)
    judged(learning, learning.next(), gain=20)
    return learning, version


def kinds(learning: Learning) -> list[str]:
    return [event["event"] for event in learning.history.events]


def test_training_needs_outputs_and_then_new_ones(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    arrive(learning, tmp_path, 80, 1)
    assert learning.next() is None
    assert (learning.planner.have, learning.planner.needed) == (80, 100)
    arrive(learning, tmp_path, 20, 2)
    arrive(learning, tmp_path, 20, 3, Outcome.LEFT)
    work = learning.next()
    assert work is not None
    assert isinstance(work.job, jobs.Train)
    assert (work.kind, work.outputs, len(work.job.requests)) == (Kind.TRAINING, 100, 120)
    learning.failed(work, "out of memory")
    assert learning.next() is None  # not at once
    learning.planner.tried = -1e9
    arrive(learning, tmp_path, 20, 4)
    trained(learning, learning.next(), b"one")
    assert learning.state.trained_outputs == 120
    assert kinds(learning) == ["error", "trained"]


def test_a_shard_that_was_damaged_on_the_disk_is_left_out(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    arrive(learning, tmp_path, 120, 1)
    work = learning.next()
    assert work is not None
    learning.store.path(2).write_bytes(b"damaged")
    learning.failed(work, "not a whole shard")
    assert "1 damaged shards" in learning.history.events[-1]["text"]
    again = learning.next()
    assert again is not None
    assert (again.outputs, again.files) == (100, work.files - {2})


def test_the_newest_states_that_fit_are_trained_on(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner", most_pairs=60)
    arrive(learning, tmp_path, 100, 1)
    assert learning.next() is None  # 20 prompts are too few
    learning = opened(tmp_path / "learner", memory_bytes=40 * synthetic.HIDDEN * 250)
    work = learning.next()
    assert work is not None
    assert work.outputs == 83  # of three states each
    assert work.began == 1
    assert work.files == {1, 2, 3, 4, 5}


def test_a_trial_reads_only_what_came_after_the_training(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    arrive(learning, tmp_path, 100, 1)
    version = trained(learning, learning.next(), b"one")
    assert learning.next() is None
    assert learning.wanted(CURVE) == CURVE
    arrive(learning, tmp_path, 80, 2)
    work = learning.next()
    assert work is not None
    assert isinstance(work.job, jobs.Judge)
    assert len(work.job.requests) == 60
    assert all(request.startswith("gateway/2-") for request in work.job.requests)
    assert work.job.began == [6] * 20 + [7] * 20 + [8] * 20
    # The curve of an output has those that had ended when it began, as in a gateway.
    assert sorted(work.job.lengths) == [(shard, 60, False) for shard in range(1, 10) for _ in range(20)]
    assert work.job.checkpoints == {CHALLENGER: str(learning.versions.path(version))}
    judged(learning, work, gain=20)
    assert learning.state.champion == version
    assert learning.wanted(CURVE) == learning.wanted("ab" * 32) == version
    event = learning.history.events[-1]
    assert (event["event"], event["version"], event["outputs"]) == ("promoted", version, 60)
    assert event["difference"] < event["difference_high"] < 0
    assert event["crps_challenger"] < event["crps_curve"]


def test_a_trial_whose_outputs_are_deleted_meanwhile_ends_with_a_last_look(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner", looks=[60, 200, 400])
    arrive(learning, tmp_path, 100, 1)
    trained(learning, learning.next(), b"one")
    bytes_kept = learning.store.size  # 100 outputs
    arrive(learning, tmp_path, 60, 2)
    judged(learning, learning.next(), gain=0)
    for seed in range(3, 5):
        assert learning.next() is None
        arrive(learning, tmp_path, 40, seed)
        learning.store.prune(bytes_kept, 7)
    work = learning.next()
    assert work is not None
    assert (work.kind, work.last, work.outputs) == (Kind.TRIAL, True, 100)
    judged(learning, work, gain=0)
    assert learning.state.challenger is None
    assert "allow no more outputs" in learning.history.events[-1]["text"]
    # A training that needs more outputs than can be there at once begins with those that are.
    learning.state.trained_outputs, learning.planner.tried = 1000, -1e9
    work = learning.planner.next(learning.cohort(0), 0.0)
    assert work is not None
    assert (work.kind, work.outputs) == (Kind.TRAINING, 100)


def test_too_few_distinct_prompts_are_one_event(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    generator = np.random.default_rng(0)
    for n in range(9):
        made = [synthetic.output(f"{n}-{m}", 60, generator) for m in range(20)]
        for output in made:
            output.prompt = "the same"
        learning.store.take(synthetic.shard(tmp_path, made), synthetic.CONTEXT)
        assert learning.next() is None
    assert kinds(learning) == ["error"]
    assert "of these 1 prompts they have" in learning.history.events[0]["text"]
    arrive(learning, tmp_path, 100, 1)
    learning.planner.checked = (CURVE, learning.store.number)  # the comparison with the curve comes first otherwise
    trained(learning, learning.next(), b"one")
    assert not learning.planner.obstacle


def test_a_champion_that_can_never_be_checked_is_one_event(tmp_path: Path) -> None:
    learning, _ = promoted(tmp_path)
    learning.planner.tried = 1e12
    bytes_kept = learning.store.size  # 160 outputs, and a check takes 200
    for seed in range(3, 13):
        arrive(learning, tmp_path, 40, seed)
        learning.store.prune(bytes_kept, 7)
        assert learning.next() is None
    assert kinds(learning) == ["trained", "promoted", "error"]
    assert "what is stored holds 160 outputs, and it takes 100" in learning.history.events[-1]["text"]


def test_a_challenger_that_is_no_better_is_rejected_after_the_last_look(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    arrive(learning, tmp_path, 100, 1)
    trained(learning, learning.next(), b"one")
    arrive(learning, tmp_path, 60, 2)
    judged(learning, learning.next(), gain=0)
    assert learning.state.challenger is not None
    arrive(learning, tmp_path, 60, 3)
    work = learning.next()
    assert work is not None
    assert work.outputs == 120
    judged(learning, work, gain=0)
    assert (learning.state.challenger, learning.state.champion) == (None, CURVE)
    assert kinds(learning)[-1] == "rejected"


def test_a_champion_that_gets_worse_than_the_curve_is_demoted(tmp_path: Path) -> None:
    learning, version = promoted(tmp_path)
    arrive(learning, tmp_path, 120, 3)
    work = learning.next()
    assert work is not None
    assert work.kind is Kind.CHECK
    judged(learning, work, gain=5)
    assert learning.state.champion == version
    row = learning.losses[-1]
    assert row["champion"] < row["curve"]
    assert row["challenger"] is None
    arrive(learning, tmp_path, 100, 4)
    learning.planner.tried = 1e12  # not yet another training
    judged(learning, learning.next(), gain=-5)
    assert learning.state.champion == CURVE
    assert kinds(learning)[-1] == "demoted"
    assert learning.wanted(version) == CURVE
    # What it failed on is trained on next, and not what came before.
    work = learning.next()
    assert work is not None
    assert work.kind is Kind.TRAINING
    assert work.began == learning.state.train_from > learning.versions[version].through


def test_results_about_others_than_now_are_of_no_use(tmp_path: Path) -> None:
    learning, version = promoted(tmp_path)
    arrive(learning, tmp_path, 120, 3)
    work = learning.next()
    learning.rollback()
    judged(learning, work, gain=-5)
    assert "demoted" not in kinds(learning)
    learning.rollback(version[:8])
    learning.freeze(frozen=True)
    judged(learning, work, gain=-5)
    assert learning.state.champion == version
    assert learning.next() is None


def test_a_look_that_fails_is_tried_again_and_then_given_up(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    arrive(learning, tmp_path, 100, 1)
    version = trained(learning, learning.next(), b"one")
    arrive(learning, tmp_path, 60, 2)
    learning.planner.tried = 1e12  # not yet another training
    for _ in range(3):
        assert learning.state.challenger == version
        learning.planner.judge_from = -1e9
        work = learning.planner.next(learning.cohort(0), 0.0)
        assert work is not None
        learning.failed(work, "killed")
        assert learning.next() is None  # not at once
    assert learning.state.challenger is None
    assert kinds(learning) == ["trained", "error", "error", "error", "rejected"]
    assert "could not be judged, 3 times: killed" in learning.history.events[-1]["text"]


def test_a_training_that_ends_while_frozen_makes_no_challenger(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    arrive(learning, tmp_path, 100, 1)
    work = learning.next()
    learning.freeze(frozen=True)
    trained(learning, work, b"one")
    assert learning.state.challenger is None
    assert kinds(learning) == ["frozen"]
    assert not list(learning.folder.versions.iterdir())
    learning.freeze(frozen=False)
    trained(learning, learning.next(), b"one")  # at once
    assert learning.state.challenger is not None


@pytest.mark.parametrize("frozen", [True, False])
def test_an_unreadable_state_keeps_the_freeze(tmp_path: Path, frozen: bool) -> None:
    learning, _ = promoted(tmp_path)
    learning.freeze(frozen=True)
    learning.freeze(frozen=frozen)
    learning.save()
    learning.folder.state.write_bytes(b"{")
    again = opened(tmp_path / "learner")
    assert again.state.frozen is frozen
    assert f"it is {'frozen' if frozen else 'not frozen'}" in again.history.events[-1]["text"]


def promoted_twice(tmp_path: Path) -> tuple[Learning, str, str]:
    """Return learning with a champion, and the versions before it and of it."""
    learning, first = promoted(tmp_path)
    learning.planner.tried = -1e9
    second = trained(learning, learning.planner.next(learning.cohort(0), 0.0), b"second")
    arrive(learning, tmp_path, 60, 3)
    judged(learning, learning.next(), gain=20)
    assert learning.state.champion == second
    return learning, first, second


def test_rollback_by_hand(tmp_path: Path) -> None:
    learning, first, second = promoted_twice(tmp_path)
    assert first[:12] in learning.rollback()
    assert learning.state.champion == first
    learning.rollback("curve")
    assert learning.state.champion == CURVE
    with pytest.raises(LearnerError, match="curve is the champion already"):
        learning.rollback()
    with pytest.raises(LearnerError, match=f"none of the versions: .*{second[:12]}"):
        learning.rollback("zz")
    learning.rollback(second)
    with pytest.raises(LearnerError, match="already"):
        learning.rollback(second[:8])
    learning.rollback(first)
    assert second[:12] in learning.rollback()
    assert learning.state.champion == second
    assert kinds(learning).count("rolled_back") == 5


def test_a_champion_that_is_demoted_does_not_give_way_to_one_that_was_rolled_back_from(tmp_path: Path) -> None:
    learning, first, _ = promoted_twice(tmp_path)
    learning.rollback(first)
    arrive(learning, tmp_path, 120, 4)
    learning.planner.tried = 1e12
    judged(learning, learning.next(), gain=-5)
    assert kinds(learning)[-1] == "demoted"
    assert learning.state.champion == CURVE


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    learning, version = promoted(tmp_path)
    learning.freeze(frozen=True)
    learning.save()
    again = opened(tmp_path / "learner")
    assert again.state == learning.state
    assert again.state.champion == version
    assert again.history.events == learning.history.events
    assert set(again.store.outputs) == set(learning.store.outputs)
    assert again.next() is None


def test_an_unreadable_state_is_made_from_the_versions(tmp_path: Path) -> None:
    learning, version = promoted(tmp_path)
    learning.save()
    learning.folder.state.write_bytes(b"{")
    again = opened(tmp_path / "learner")
    assert again.state.champion == version
    assert (again.state.model, again.store.number) == (synthetic.MODEL, learning.store.number)
    assert again.state.trained_outputs == 100
    assert list((tmp_path / "learner").glob("state.json.unreadable-*"))
    assert "not readable" in again.history.events[-1]["text"]
    again.rollback()
    again.folder.state.write_bytes(b"{")
    assert opened(tmp_path / "learner").state.champion == CURVE


def test_a_champion_whose_file_is_gone_is_given_up(tmp_path: Path) -> None:
    learning, version = promoted(tmp_path)
    learning.save()
    learning.versions.path(version).unlink()
    again = opened(tmp_path / "learner")
    assert again.state.champion == CURVE
    assert "gone or damaged" in again.history.events[-1]["text"]


def test_a_damaged_champion_is_given_up_at_the_start_or_when_it_is_noticed(tmp_path: Path) -> None:
    learning, first = promoted(tmp_path)
    learning.planner.tried = -1e9
    arrive(learning, tmp_path, 20, 7)
    second = trained(learning, learning.planner.next(learning.cohort(0), 0.0), b"second")
    arrive(learning, tmp_path, 60, 3)
    work = learning.next()
    assert work is not None
    assert work.kind is Kind.TRIAL
    learning.save()
    learning.versions.path(first).write_bytes(b"")
    # At a start.
    again = opened(tmp_path / "learner")
    assert (again.state.champion, again.state.challenger) == (CURVE, second)
    assert f"{first[:12]} is gone or damaged" in again.history.events[-1]["text"]
    # In a trial, where the challenger is not to blame.
    learning.failed(work, "not a whole checkpoint")
    assert (learning.state.champion, learning.state.challenger) == (CURVE, second)
    assert "the champion is now the residual-life curve" in learning.history.events[-2]["text"]
    judged(learning, learning.next(), gain=20)
    assert learning.state.champion == second
    # A challenger that is damaged itself.
    arrive(learning, tmp_path, 80, 8)
    judged(learning, learning.next(), gain=20)
    learning.planner.tried = -1e9
    third = trained(learning, learning.planner.next(learning.cohort(0), 0.0), b"third")
    arrive(learning, tmp_path, 60, 9)
    work = learning.next()
    assert work is not None
    learning.versions.path(third).unlink()
    learning.failed(work, "gone")
    assert (learning.state.champion, learning.state.challenger) == (second, None)


def test_a_shipped_checkpoint_whose_copy_is_damaged_is_copied_again(tmp_path: Path) -> None:
    version = version_for(DEFAULT_MODEL)
    settings = LearnerSettings(folder=tmp_path / "learner", workers=["http://a"])
    learning = Learning(Folder(tmp_path / "learner"), settings, by_version())
    learning.found_at("decode-0", version)
    learning.save()
    learning.versions.path(version).write_bytes(b"")
    again = Learning(Folder(tmp_path / "learner"), settings, by_version())
    assert (again.state.champion, again.wanted(version)) == (CURVE, None)
    again.found_at("decode-0", version)
    assert again.state.champion == version
    assert again.versions.whole(version)


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    learning, _ = promoted(tmp_path)
    learning.save()
    with pytest.raises(LearnerError, match="belongs to synthetic/model, not to another/model: give another --folder"):
        opened(tmp_path / "learner", model="another/model")


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learning, version = promoted(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        for _ in range(3):
            learning.save()
    assert caplog.text.count("No space left") == 1
    learning.save()
    assert opened(tmp_path / "learner").state.champion == version
    assert kinds(opened(tmp_path / "learner")) == ["trained", "promoted"]


def test_a_shipped_checkpoint_is_the_first_champion_of_a_new_folder(tmp_path: Path) -> None:
    version = version_for(DEFAULT_MODEL)
    settings = LearnerSettings(folder=tmp_path / "learner", workers=["http://a"])
    learning = Learning(Folder(tmp_path / "learner"), settings, by_version())
    learning.found_at("decode-0", "ab" * 32)
    assert learning.state.champion == CURVE
    assert learning.wanted("ab" * 32) is None
    learning.found_at("decode-0", version)
    assert learning.state.champion == version
    assert learning.wanted("ab" * 32) is None
    assert learning.wanted(CURVE) == version
    other = Learning(Folder(tmp_path / "other"), settings.model_copy(update={"model": "another"}), by_version())
    other.found_at("decode-0", version)
    assert other.state.champion == CURVE


# --- commands without a learner, and reports ---


def test_commands_work_where_no_learner_runs(tmp_path: Path) -> None:
    learning, version = promoted(tmp_path)
    learning.save()
    folder = learning.folder

    def command(name: str, of: str = "") -> str:
        return commands.carry_out(folder, commands.Command(command=name, version=of))

    assert "frozen" in command("freeze")
    assert command("freeze") == "frozen already"
    assert version[:12] in command("rollback")
    with pytest.raises(LearnerError, match="nothing to roll back to"):
        command("rollback")
    again = opened(tmp_path / "learner")
    assert (again.state.champion, again.state.frozen) == (CURVE, True)
    assert not list(folder.commands.iterdir())
    with pytest.raises(LearnerError, match="no learner has worked here"):
        commands.carry_out(Folder(tmp_path / "none"), commands.Command(command="freeze"))


def test_a_learner_that_does_not_answer(tmp_path: Path) -> None:
    learning, _ = promoted(tmp_path)
    with learning.folder.locked(), pytest.raises(LearnerError, match=f"pid {os.getpid()} on .* has not answered"):
        commands.carry_out(learning.folder, commands.Command(command="freeze"), timeout_s=0.3)
    assert not list(learning.folder.commands.iterdir())


@pytest.mark.parametrize("content", [b"{", b'{"command": "burn"}', b"\xff"])
def test_commands_that_are_none(tmp_path: Path, content: bytes) -> None:
    learning = opened(tmp_path / "learner")
    (learning.folder.commands / "a.json").write_bytes(content)
    assert commands.take(learning) == 1
    assert "error" in json.loads((learning.folder.commands / "a.answer").read_bytes())


def test_the_report(tmp_path: Path) -> None:
    learning, version = promoted(tmp_path)
    made = report.build(learning, "collecting", {"decode-0": version})
    assert made["champion"] | {"since": 0} == {
        "version": version,
        "kind": "network",
        "trained_outputs": 100,
        "since": 0,
    }
    assert (made["challenger"], made["frozen"], made["doing"]) == (None, False, "collecting")
    # As a gateway reads it, which refuses what it does not know.
    read = Report.model_validate_json(report.encoded(made))
    assert [event.event for event in read.events] == ["trained", "promoted"]
    learning.planner.tried = -1e9
    trained(learning, learning.planner.next(learning.cohort(0), 0.0), b"second")
    arrive(learning, tmp_path, 120, 3)
    judged(learning, learning.next(), gain=-9)
    learning.rollback()
    for state in ({}, {"decode-0": ""}):
        Report.model_validate_json(report.encoded(report.build(learning, "frozen", state)))
    empty = opened(tmp_path / "empty")
    Report.model_validate_json(report.encoded(report.build(empty, "collecting", {})))


def test_a_report_of_a_model_without_a_proper_name(tmp_path: Path) -> None:
    learning = opened(tmp_path / "learner")
    for model, shown in ((" ", "not known yet"), ("m" * 300, "m" * 256)):
        learning.state.model = model
        made = report.build(learning, "collecting", {f"instance-{n}": "" for n in range(3000)})
        read = Report.model_validate_json(json.dumps(made))
        assert (read.model, len(read.instances)) == (shown, 2048)


@pytest.mark.parametrize(
    "crowd",
    [
        lambda made: made["events"].extend({"text": "x" * 10_000} for _ in range(50)),
        lambda made: made["losses"].extend([{"outputs": 1}] * 100_000),
        lambda made: made["instances"].update({f"instance-{n}": "ab" * 32 for n in range(10_000)}),
    ],
)
def test_a_report_is_bounded(tmp_path: Path, crowd: Callable[[dict[str, object]], None]) -> None:
    made = report.build(opened(tmp_path / "learner"), "collecting", {})
    crowd(made)
    assert len(report.encoded(made)) <= LARGEST_REPORT_BYTES
