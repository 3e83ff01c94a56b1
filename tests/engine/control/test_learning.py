"""A learner at an instance's control channel."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ares.engine.control import ControlChannel
from ares.engine.learning.folder import LearningFolder, Predicting
from ares.engine.learning.service import NOT_LEARNING, LearningService
from ares.protocol import messages
from tests.engine.control_channel import HELLO, Gateway, Instance, free_address

NAME = "part-000000000001-0123abcd.safetensors"
DATA = b"a checkpoint"
VERSION = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> LearningFolder:
    made = LearningFolder(tmp_path)
    made.prepare()
    return made


@pytest.fixture
def learner(folder: LearningFolder) -> Iterator[Gateway]:
    address = free_address()
    channel = ControlChannel(address, HELLO, lambda: None, learning=LearningService(folder, ""))
    made = Gateway(address)
    yield made
    made.close()
    channel.close()


def test_recorded_states_are_taken(folder: LearningFolder, learner: Gateway) -> None:
    (folder.recorded / NAME).write_bytes(b"states")
    learner.send(messages.TakeRecorded(1, "learner"))
    assert learner.receive_a(messages.Recorded) == messages.Recorded(1, NAME, b"states", 0)
    learner.send(messages.TakeRecorded(2, "learner", [NAME]))
    assert learner.receive_a(messages.Recorded) == messages.Recorded(2)
    assert not list(folder.recorded.iterdir())


def test_a_checkpoint_is_ordered(folder: LearningFolder, learner: Gateway) -> None:
    learner.send(messages.CheckpointPart(1, "learner", VERSION, 0, len(DATA), DATA))
    assert learner.receive_a(messages.CheckpointReceived) == messages.CheckpointReceived(1, len(DATA))
    wanted = folder.wanted()
    assert wanted is not None
    assert wanted.version == VERSION


def test_an_instance_that_does_not_learn_answers(instance: Instance, gateway: Gateway) -> None:
    """The engine thread gets neither command, and the channel goes on."""
    gateway.send(messages.TakeRecorded(1, "learner"))
    assert gateway.receive_a(messages.Recorded) == messages.Recorded(1, refused=NOT_LEARNING)
    gateway.send(messages.CheckpointPart(2, "learner", VERSION, 0, len(DATA), DATA))
    assert "does not learn" in gateway.receive_a(messages.CheckpointReceived).refused
    gateway.send(messages.Subscribe(0.01))
    gateway.receive_a(messages.Telemetry)
    assert instance.channel.commands() == []


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_predicts_is_what_the_worker_reports(folder: LearningFolder) -> None:
    clock = Clock()
    service = LearningService(folder, "f" * 64, clock)
    assert service.predicting() == Predicting("f" * 64)
    folder.report(Predicting(VERSION, ("0" * 64, "not whole")))
    clock.now += 1
    assert service.predicting() == Predicting(VERSION, ("0" * 64, "not whole"))
