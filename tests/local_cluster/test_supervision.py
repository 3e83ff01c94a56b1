"""A cluster that goes on when a process ends, with small scripts in place of engines and gateway."""

import dataclasses
import io
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from ares.local_cluster.cluster import Cluster, ClusterError, ManagedProcess, running
from ares.local_cluster.restarts import RestartPolicy
from ares.local_cluster.supervision import Supervisor
from tests.local_cluster.test_cluster import Stage, alive, quiet, stage  # noqa: F401 - a fixture

pytestmark = pytest.mark.timeout(60)
AT_ONCE = RestartPolicy(first_delay_s=0, limit=2)


def lines(cluster: Cluster) -> list[str]:
    """What was printed since the start."""
    assert isinstance(cluster.console.file, io.StringIO)
    every = cluster.console.file.getvalue().splitlines()
    return [line for line in every if not re.match(r"\S+: (starting|ready after)", line)]


def until(supervisor: Supervisor, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        supervisor.check()
        time.sleep(0.02)


def kill(process: ManagedProcess) -> int:
    """Kill its leader only, as somebody with a pid does."""
    process.popen.kill()
    process.popen.wait()
    return process.popen.pid


@pytest.mark.parametrize("name", ["prefill-0", "decode-1"])
def test_a_worker_that_dies_is_started_again(stage: Stage, name: str) -> None:  # noqa: F811
    with running(stage.settings, quiet()) as cluster:
        others = [process.popen.pid for process in cluster.processes if process.name != name]
        process = next(process for process in cluster.processes if process.name == name)
        supervisor = Supervisor(cluster, AT_ONCE)
        supervisor.check()
        assert lines(cluster) == []
        before, url = kill(process), process.url
        until(supervisor, lambda: len(lines(cluster)) >= 3)
        assert process.ready()
        assert process.url == url
        assert process.popen.pid != before
        assert [p.popen.pid for p in cluster.processes if p.name != name] == others
        killed, starts, ready = lines(cluster)
        assert killed == f"{name} was killed (SIGKILL); it is started again in 0 s (log: {process.log})"
        assert starts == f"{name} starts again (try 1 of 2)"
        assert re.fullmatch(rf"{name} is ready again after \d+ s", ready)
        # Both lives are in the log.
        assert process.log.read_text().count(f"{name}: line 99") == 2
    assert stage.nothing_left()


def test_what_it_had_started_is_gone_before_it_starts_again(
    stage: Stage,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that outlives its server would keep its ports and its memory."""
    monkeypatch.setenv("FAKE_PARENT", "decode-0")
    with running(stage.settings, quiet()) as cluster:
        child = stage.started()["decode-0-child"]
        restart = Cluster.restart
        seen: list[bool] = []

        def watched(self: Cluster, process: ManagedProcess) -> None:
            seen.append(alive(child))
            restart(self, process)

        monkeypatch.setattr(Cluster, "restart", watched)
        kill(cluster.processes[1])
        assert alive(child)
        until(Supervisor(cluster, AT_ONCE), lambda: len(lines(cluster)) >= 3)
        assert seen == [False]
    assert stage.nothing_left()


def test_the_gateway_too(stage: Stage) -> None:  # noqa: F811
    with running(stage.settings, quiet()) as cluster:
        kill(cluster.processes[-1])
        until(Supervisor(cluster, AT_ONCE), lambda: len(lines(cluster)) >= 3)
        assert lines(cluster)[0].startswith("gateway was killed (SIGKILL), and its streams are lost; it is started")
        assert cluster.processes[-1].ready()
    assert stage.nothing_left()


def test_a_worker_that_dies_again_and_again_is_given_up_and_the_rest_serves_on(
    stage: Stage,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(stage.settings, quiet()) as cluster:
        _, first, second, _ = cluster.processes
        supervisor = Supervisor(cluster, AT_ONCE)
        monkeypatch.setenv("FAKE_DIES", "decode-0")
        kill(first)
        until(supervisor, lambda: "given up" in "".join(lines(cluster)))
        told = lines(cluster)
        ends = [line for line in told if line.startswith("decode-0 ended with status 3; it is started again")]
        assert len(ends) == 1
        assert (
            f"decode-0 ended with status 3; it has ended 3 times in a row and is given up; the end of {first.log}:"
            in told
        )
        assert told[-1] == "out of memory: make room"
        for _ in range(3):
            supervisor.check()
        assert lines(cluster) == told
        assert second.ready()
        # With the last one that decodes goes the service, whatever else lives.
        monkeypatch.setenv("FAKE_DIES", "decode-1")
        kill(second)
        with pytest.raises(ClusterError, match=r"without decode-0, decode-1 \(logs: "):
            until(supervisor, lambda: False)
    assert stage.nothing_left()


def test_nothing_is_served_without_a_gateway(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with running(stage.settings, quiet()) as cluster:
        monkeypatch.setenv("FAKE_DIES", "gateway")
        kill(cluster.processes[-1])
        with pytest.raises(ClusterError, match="without gateway"):
            until(Supervisor(cluster, AT_ONCE), lambda: False)
    assert stage.nothing_left()


def test_prefill_workers_can_all_go(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Decode workers prefill where nobody else does."""
    with running(stage.settings, quiet()) as cluster:
        monkeypatch.setenv("FAKE_DIES", "prefill-0")
        kill(cluster.processes[0])
        supervisor = Supervisor(cluster, AT_ONCE)
        until(supervisor, lambda: "given up" in "".join(lines(cluster)))
        supervisor.check()


def test_a_worker_that_never_answers_again_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with running(stage.settings, quiet()) as cluster:
        cluster.settings = dataclasses.replace(cluster.settings, start_timeout_s=0.5)
        monkeypatch.setenv("FAKE_SLOW", "decode-0")
        kill(cluster.processes[1])
        until(Supervisor(cluster, AT_ONCE), lambda: "given up" in "".join(lines(cluster)))
        assert lines(cluster).count("decode-0 is not ready after 1 s and is killed") == 2
    assert stage.nothing_left()


@pytest.mark.parametrize("when", ["in back-off", "starting"])
def test_ctrl_c_while_a_worker_is_away_leaves_nothing(
    stage: Stage,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    policy = AT_ONCE if when == "starting" else RestartPolicy()
    with running(stage.settings, quiet()) as cluster:
        monkeypatch.setenv("FAKE_SLOW", "decode-0")
        before = kill(cluster.processes[1])
        supervisor = Supervisor(cluster, policy)
        until(supervisor, lambda: len(lines(cluster)) >= (2 if when == "starting" else 1))
        assert (cluster.processes[1].popen.pid != before) == (when == "starting")
        interrupting = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            supervisor.run()
    assert len(stage.started()) == 4
    assert stage.nothing_left()


def test_the_group_of_a_part_that_has_ended_is_left_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Its number may be somebody else's by the time that the cluster stops."""
    signalled: list[int] = []
    with running(dataclasses.replace(stage.settings, decode=1), quiet()) as cluster:
        dead = kill(cluster.processes[1])
        supervisor = Supervisor(cluster, RestartPolicy(first_delay_s=1000))
        supervisor.check()
        killpg = os.killpg
        monkeypatch.setattr(os, "killpg", lambda pid, number: (signalled.append(pid), killpg(pid, number)))
    assert signalled
    assert dead not in signalled


def test_delays_are_those_of_the_policy(stage: Stage) -> None:  # noqa: F811
    now = [0.0]
    with running(stage.settings, quiet()) as cluster:
        supervisor = Supervisor(cluster, RestartPolicy(first_delay_s=100, longest_delay_s=100), clock=lambda: now[0])
        dead = kill(cluster.processes[1])
        for now[0] in (1.0, 50.0, 100.9):
            supervisor.check()
            assert cluster.processes[1].popen.pid == dead
        now[0] = 101.0
        supervisor.check()
        assert cluster.processes[1].popen.pid != dead
        assert lines(cluster)[0].startswith("decode-0 was killed (SIGKILL); it is started again in 100 s")


def test_run_looks_again_and_again(stage: Stage) -> None:  # noqa: F811
    with running(stage.settings, quiet()) as cluster:
        threading.Timer(0.3, cluster.processes[-1].popen.kill).start()
        with pytest.raises(ClusterError, match="without gateway"):
            Supervisor(cluster, RestartPolicy(limit=0)).run()


def test_a_signal_without_a_name(stage: Stage) -> None:  # noqa: F811
    with running(stage.settings, quiet()) as cluster:
        os.kill(cluster.processes[1].popen.pid, signal.SIGRTMIN + 3)
        until(Supervisor(cluster, AT_ONCE), lambda: len(lines(cluster)) >= 3)
        assert lines(cluster)[0].startswith(f"decode-0 was killed (signal {signal.SIGRTMIN + 3}); it is started again")


def test_a_start_that_fails_counts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Out of memory or processes for a while, it is tried again; and nothing is signalled that is not ours."""

    def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with running(stage.settings, quiet()) as cluster:
        kill(cluster.processes[1])
        supervisor = Supervisor(cluster, AT_ONCE)
        supervisor.check()
        monkeypatch.setattr(subprocess, "Popen", no_process)
        monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("its group may be another process's"))
        until(supervisor, lambda: "given up" in "".join(lines(cluster)))
        monkeypatch.undo()
        said = "decode-0 could not be started: [Errno 11] Resource temporarily unavailable"
        assert lines(cluster).count(said) == 2
