"""`ares up --learn`: the learner is a process of the cluster, and nothing is served by it."""

import dataclasses
import json

import pytest

from ares.local_cluster.cluster import ClusterSettings, running
from ares.local_cluster.supervision import Supervisor
from tests.local_cluster.test_cluster import Stage, quiet, stage  # noqa: F401 - a fixture
from tests.local_cluster.test_supervision import AT_ONCE, kill, lines, until

pytestmark = pytest.mark.timeout(60)


def learning(stage: Stage) -> ClusterSettings:  # noqa: F811
    folder = stage.folder / "learned"
    return dataclasses.replace(stage.settings, learn_folder=folder, learner_flags=("--checkpoint", "given"))


def test_instances_learn_and_the_learner_knows_all_of_them(stage: Stage) -> None:  # noqa: F811
    settings = learning(stage)
    with running(settings, quiet()) as cluster:
        assert [process.name for process in cluster.processes] == [
            "prefill-0",
            "decode-0",
            "decode-1",
            "gateway",
            "learner",
        ]
        assert [process.name for process in cluster.workers] == ["prefill-0", "decode-0", "decode-1"]
        assert cluster.url == f"http://127.0.0.1:{settings.port}"
        until(Supervisor(cluster, AT_ONCE), lambda: "learner" in stage.started())
        commands = {path.stem: json.loads(path.read_text()) for path in stage.folder.glob("*.command")}
    for name in ("prefill-0", "decode-0", "decode-1"):
        flags = commands[name][: commands[name].index("--")]
        assert "--learn" in flags
        assert flags[flags.index("--learn-folder") + 1] == str(settings.learn_folder / "instances" / name)  # type: ignore[operator]
    learner = commands["learner"]
    assert learner[:4] == ["predictor", "learn", "--gateway", cluster.url]
    assert learner.count("--worker") == 3
    assert learner[learner.index("--folder") + 1] == str(settings.learn_folder)
    assert learner[-2:] == ["--checkpoint", "given"]
    assert stage.nothing_left()


def test_a_learner_that_ends_is_started_again_and_at_last_given_up(stage: Stage) -> None:  # noqa: F811
    with running(learning(stage), quiet()) as cluster:
        learner = cluster.processes[-1]
        supervisor = Supervisor(cluster, AT_ONCE)
        for _ in range(AT_ONCE.limit):
            kill(learner)
            cluster.check()  # as with --no-restart: serving does not end with it
            until(supervisor, lambda: learner.popen.poll() is None and "ready again" in lines(cluster)[-1])
        kill(learner)
        until(supervisor, lambda: "given up" in "".join(lines(cluster)))
        supervisor.check()
        assert all(process.ready() for process in cluster.processes[:-1])


def test_without_it_there_is_no_learner(stage: Stage) -> None:  # noqa: F811
    with running(stage.settings, quiet()) as cluster:
        assert cluster.processes[-1].name == "gateway"
        assert "--learn" not in cluster.processes[0].command
