"""The parent, with processes that only pretend to serve."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from ares.gateway.processes.acceptor import SHUT_DOWN, TAKES, Acceptor, listen
from ares.gateway.processes.parent import Parent
from ares.gateway.processes.shared_counts import SharedCounts


class Start(Protocol):
    """Starts a parent whose processes do what `serve` does, at an address if one is given."""

    def __call__(
        self, serve: Callable[[socket.socket], None], listeners: list[socket.socket] | None = None
    ) -> BaseProcess: ...


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[BaseProcess] = []

    def begin(serve: Callable[[socket.socket], None], listeners: list[socket.socket] | None = None) -> BaseProcess:
        at = listeners or listen("127.0.0.1", 0)

        def run() -> None:
            raise SystemExit(Parent(at, SharedCounts(2), serve).run())

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        for listener in at:
            listener.close()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def until_told(link: socket.socket) -> None:
    """Take connections until the parent says that it is enough, or has ended."""
    link.setblocking(True)
    link.send(TAKES)
    while link.recv(1) not in (SHUT_DOWN, b""):
        pass


def test_where_no_process_can_serve_the_gateway_ends(start: Start) -> None:
    def fail(_: socket.socket) -> None:
        raise SystemExit(7)

    parent = start(fail)
    parent.join(20)
    assert parent.exitcode == 3


def test_a_process_that_ends_again_and_again_is_started_later_and_later(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def serve(link: socket.socket) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        until_told(link)

    def pids(count: int) -> list[int]:
        until = time.monotonic() + 20
        while len(found := log.read_text().split() if log.exists() else []) < count:
            assert time.monotonic() < until
            time.sleep(0.005)
        return [int(pid) for pid in found]

    parent = start(serve)
    pauses = []
    for count in range(2, 4):
        began = time.monotonic()
        os.kill(pids(count)[-1], signal.SIGKILL)
        pids(count + 1)
        pauses.append(time.monotonic() - began)
    assert pauses[1] >= 0.5
    parent.terminate()
    parent.join(20)
    assert parent.exitcode == 256 - signal.SIGTERM  # `run` leaves it to its caller to end by the signal
    assert len(log.read_text().split()) == 4


def test_a_process_that_hangs_neither_takes_connections_nor_stays_when_all_are_to_end(start: Start) -> None:
    taking = multiprocessing.get_context("fork").Semaphore(0)

    def hang(link: socket.socket) -> None:
        link.send(TAKES)
        taking.release()
        time.sleep(30)  # not for ever, should the parent leave it behind

    def refused() -> bool:
        try:
            socket.create_connection(address, 5).close()
        except ConnectionRefusedError:
            return True
        return False

    listeners = listen("127.0.0.1", 0)
    address = listeners[0].getsockname()
    parent = start(hang, listeners)
    assert all(taking.acquire(timeout=20) for _ in range(2))
    assert not refused()
    parent.terminate()
    until = time.monotonic() + 20
    while not refused():
        assert time.monotonic() < until
        time.sleep(0.005)
    assert parent.is_alive()
    parent.terminate()
    parent.join(20)
    assert parent.exitcode == 256 - signal.SIGTERM


def test_a_process_that_cannot_be_started_is_tried_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, fork, here = tmp_path / "log", os.fork, os.getpid()

    def fails_twice() -> int:
        if os.getppid() == here and log.exists() and 2 <= len(log.read_text().split()) < 4:
            with log.open("a") as file:
                file.write("failed\n")
            raise BlockingIOError("no more processes")
        return fork()

    def serve(link: socket.socket) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        until_told(link)

    monkeypatch.setattr(os, "fork", fails_twice)
    listeners = listen("127.0.0.1", 0)
    address = listeners[0].getsockname()
    parent = start(serve, listeners)
    until(lambda: len(log.read_text().split()) == 2 if log.exists() else False)
    os.kill(int(log.read_text().split()[0]), signal.SIGRTMIN + 6)  # which has no name
    until(lambda: len(log.read_text().split()) == 5)
    assert log.read_text().split()[2:4] == ["failed", "failed"]
    socket.create_connection(address, 5).close()
    parent.terminate()
    parent.join(20)
    assert parent.exitcode == 256 - signal.SIGTERM


def test_a_process_that_has_not_read_for_a_moment_is_not_killed_by_the_first_signal(
    start: Start, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    taking = multiprocessing.get_context("fork").Semaphore(0)

    def serve(link: socket.socket) -> None:
        link.send(TAKES)
        taking.release()
        until((tmp_path / "go").exists)
        until_told(link)
        with log.open("a") as file:
            file.write("ended\n")

    listeners = listen("127.0.0.1", 0)
    address = listeners[0].getsockname()
    parent = start(serve, listeners)
    assert all(taking.acquire(timeout=20) for _ in range(2))
    clients = [socket.create_connection(address, 5) for _ in range(700)]  # more than fit in both links
    parent.terminate()
    time.sleep(0.3)
    (tmp_path / "go").touch()
    parent.join(20)
    assert parent.exitcode == 256 - signal.SIGTERM
    assert log.read_text().split() == ["ended", "ended"]
    for client in clients:
        client.close()


def test_processes_end_with_a_parent_that_ends_by_an_error(start: Start, tmp_path: Path) -> None:
    pids, broken = tmp_path / "pids", tmp_path / "broken"

    def serve(link: socket.socket) -> None:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        until_told(link)

    def hand_out(acceptor: Acceptor, once: Callable[[Acceptor], None] = Acceptor.hand_out) -> None:
        if broken.exists():
            raise RuntimeError("broken")
        once(acceptor)

    listeners = listen("127.0.0.1", 0)
    address = listeners[0].getsockname()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Acceptor, "hand_out", hand_out)
        parent = start(serve, listeners)
    until(lambda: len(pids.read_text().split()) == 2 if pids.exists() else False)
    broken.touch()
    socket.create_connection(address, 5).close()  # wakes it
    parent.join(20)
    assert parent.exitcode == 1
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
