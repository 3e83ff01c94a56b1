"""`ares up`, with small scripts in place of engines and gateway: what starts is stopped, and failures are named."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from ares.addresses import AddressError
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares.local_cluster.cluster import ClusterError, ClusterSettings, core_bindings, running, workers_only
from tests.certificates import self_signed

pytestmark = pytest.mark.timeout(30)

SCRIPT = """\
import http.server, json, os, signal, socket, ssl, subprocess, sys, time, urllib.request
from pathlib import Path

kind, *rest = sys.argv[3:]
given = dict(zip(rest, rest[1:]))
name = given.get("--name", "learner" if kind == "predictor" else "gateway")
folder = Path(os.environ["FAKE_FOLDER"])
(folder / f"{name}.pid").write_text(str(os.getpid()))
(folder / f"{name}.command").write_text(json.dumps([kind, *rest]))
if name == "learner":
    time.sleep(1000)
(folder / f"{name}.port").write_text(given["--port"])
print("\\n".join(f"{name}: line {n}" for n in range(100)), flush=True)
if os.environ.get("FAKE_DIES") == name:
    print("out of memory: make room", flush=True)
    sys.exit(3)
if os.environ.get("FAKE_STUBBORN") == name:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ.get("FAKE_PARENT") == name:
    child = subprocess.Popen(["sleep", "1000"])
    (folder / f"{name}-child.pid").write_text(str(child.pid))
if os.environ.get("FAKE_SLOW") == name:
    time.sleep(1000)
workers = [value for flag, value in zip(rest, rest[1:]) if flag == "--worker"]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = {}
        if self.path == "/version":
            for worker in workers:
                with urllib.request.urlopen(worker + "/name") as reply:
                    names[json.load(reply)["name"]] = {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"name": name, "instances": names}).encode())

host = given.get("--host", "127.0.0.1")

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

server = Server((host, int(given["--port"])), Handler)
if name == "gateway" and "FAKE_TLS" in os.environ:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.environ["FAKE_TLS"])
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Stage:
    """Where the scripts leave their traces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = ClusterSettings(
            model="m", port=free_port("127.0.0.1"), log_folder=folder / "logs", stop_timeout_s=1.0
        )

    def started(self) -> dict[str, int]:
        return {path.stem: int(path.read_text()) for path in self.folder.glob("*.pid") if path.read_text()}

    def nothing_left(self) -> bool:
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in self.started().values()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        for path in self.folder.glob("*.port"):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", int(path.read_text())))
        return True


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{SCRIPT}")
    script.chmod(0o755)
    monkeypatch.setattr(local.sys, "executable", str(script))
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    made = Stage(tmp_path)
    yield made
    for pid in made.started().values():  # where a test failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def quiet() -> Console:
    return Console(file=io.StringIO())


# --- a cluster's life ---


def test_it_starts_serves_and_leaves_nothing(stage: Stage) -> None:
    with running(stage.settings, quiet()) as cluster:
        assert [process.name for process in cluster.processes] == ["prefill-0", "decode-0", "decode-1", "gateway"]
        assert [process.name for process in cluster.workers] == ["prefill-0", "decode-0", "decode-1"]
        assert cluster.url == f"http://127.0.0.1:{stage.settings.port}"
        assert all(process.ready() for process in cluster.processes)
        cluster.check()
        assert "decode-1: line 99" in cluster.processes[2].log_end()
        assert len(stage.started()) == 4
    assert stage.nothing_left()


def test_without_prefill_instances_the_others_do_both(stage: Stage) -> None:
    settings = ClusterSettings(
        model="m", prefill=0, decode=1, port=stage.settings.port, log_folder=stage.folder, vllm_flags=("--seed", "1")
    )
    with running(settings, quiet()) as cluster:
        arguments = cluster.processes[0].popen.args
        assert isinstance(arguments, list)
        assert arguments[arguments.index("--role") + 1] == "both"
        assert arguments[-3:] == ["--", "--seed", "1"]
    assert stage.nothing_left()


def test_parts_share_a_session_and_have_a_group_each(stage: Stage) -> None:
    """Between sessions the kernel shares out the cores, and a signal goes to a group."""
    with running(stage.settings, quiet()) as cluster:
        pids = [process.popen.pid for process in cluster.processes]
        assert {os.getsid(pid) for pid in pids} == {os.getsid(0)}
        assert [os.getpgid(pid) for pid in pids] == pids


def test_ports_of_instances_are_held_while_they_load(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLOW", "decode-0")  # it listens on nothing yet
    with workers_only(stage.settings, quiet()) as cluster:
        cluster.start_worker("decode-0", "decode", None)
        ports = list(cluster.ports)
        assert len(ports) == 3
        for port in ports:
            with socket.socket() as probe, pytest.raises(OSError, match="in use"):
                probe.bind(("127.0.0.1", port))
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_an_error_inside_stops_everything(stage: Stage) -> None:
    with pytest.raises(KeyboardInterrupt), running(stage.settings, quiet()):
        raise KeyboardInterrupt
    assert len(stage.started()) == 4
    assert stage.nothing_left()


def test_children_of_processes_are_stopped_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PARENT", "decode-0")
    with running(stage.settings, quiet()):
        assert "decode-0-child" in stage.started()
    assert stage.nothing_left()


def test_processes_that_ignore_sigterm_are_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STUBBORN", "decode-0")
    with running(stage.settings, quiet()):
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert stage.nothing_left()


def test_nothing_outlives_a_launcher_that_is_killed(stage: Stage) -> None:
    code = f"""
        import os, sys, time
        from pathlib import Path
        from ares.local_cluster import cluster as local
        local.sys.executable = {local.sys.executable!r}
        settings = local.ClusterSettings(model="m", port={stage.settings.port}, log_folder=Path({str(stage.folder)!r}))
        with local.running(settings):
            print("serving", flush=True)
            time.sleep(1000)
    """
    interpreter = (stage.folder / "python").read_text().splitlines()[0].removeprefix("#!")
    with subprocess.Popen([interpreter, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"serving\n"
        launcher.kill()
    assert len(stage.started()) == 4
    assert stage.nothing_left()


@pytest.fixture(params=[False, True], ids=["alone", "beside a thread"])
def thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another thread of this process, which takes signals that the main one blocks."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    if request.param:
        other.start()
    yield
    done.set()
    if request.param:
        other.join()


@pytest.mark.usefixtures("thread")
def test_a_signal_while_a_part_starts_does_not_leave_it_behind(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes between the start of the process and the note of it; the child can be signalled all the same."""
    start = subprocess.Popen

    def signalled(*arguments: Any, **settings: Any) -> Any:
        process = start(*arguments, **settings)
        if len(cluster.processes) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # where another thread takes it, it takes that long
        return process

    monkeypatch.setattr(subprocess, "Popen", signalled)
    with workers_only(stage.settings, quiet()) as cluster:
        cluster.start_worker("decode-0", "both", None)
        with pytest.raises(KeyboardInterrupt):
            cluster.start_worker("decode-1", "both", None)
    assert [process.name for process in cluster.processes] == ["decode-0", "decode-1"]
    for process in cluster.processes:
        assert process.popen.poll() is not None


def test_parts_take_the_signals_that_were_held_back(stage: Stage) -> None:
    with running(stage.settings, quiet()) as cluster:
        for process in cluster.processes:
            status = Path(f"/proc/{process.popen.pid}/status").read_text()
            assert re.search(r"^SigBlk:\s+0+$", status, re.MULTILINE)


def test_a_start_that_nobody_watches_is_told_in_lines(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    console = quiet()
    with running(stage.settings, console) as cluster:
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        for process in cluster.processes:
            assert f"{process.name}: starting (pid {process.popen.pid}, log: {process.log})" in lines
            assert any(re.fullmatch(rf"{process.name}: ready after \d+ s", line) for line in lines)


@pytest.mark.parametrize("host", ["::", "::1"])
def test_an_ipv6_endpoint_has_brackets(stage: Stage, host: str) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 on this machine")
    with running(dataclasses.replace(stage.settings, host=host), quiet()) as cluster:
        assert cluster.url == f"http://[::1]:{stage.settings.port}"


def test_a_gateway_with_a_certificate_for_another_name_is_found_ready(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path, "DNS:ares.example")
    both = tmp_path / "both.pem"
    both.write_text(certificate.read_text() + key.read_text())
    monkeypatch.setenv("FAKE_TLS", str(both))
    with running(dataclasses.replace(stage.settings, tls=True), quiet()) as cluster:
        assert cluster.url == f"https://127.0.0.1:{stage.settings.port}"
        assert all(process.ready() for process in cluster.processes)


# --- failures ---


@pytest.mark.parametrize("name", ["prefill-0", "decode-1", "gateway"])
def test_a_part_that_dies_at_start_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FAKE_DIES", name)
    with pytest.raises(ClusterError) as failed, running(stage.settings, quiet()):
        pytest.fail("it must not start")
    message = str(failed.value)
    assert message.startswith(f"{name} ended with status 3")
    assert str(stage.folder / "logs" / f"{name}.log") in message
    # The end of the log, and only the end.
    assert message.endswith("out of memory: make room")
    assert f"{name}: line 0\n" not in message
    assert stage.nothing_left()


@pytest.mark.parametrize("name", ["decode-0", "gateway"])
def test_a_part_that_never_answers_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FAKE_SLOW", name)
    settings = dataclasses.replace(stage.settings, start_timeout_s=2.0)
    with (
        pytest.raises(ClusterError, match=r"not ready after 2 s \(--start-timeout\)") as failed,
        running(settings, quiet()),
    ):
        pytest.fail("it must not start")
    assert f": {name};" in str(failed.value)
    assert f"{name}: line 99" in str(failed.value)
    assert stage.nothing_left()


def test_a_taken_port_is_said_at_once(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", stage.settings.port)):
        began = time.monotonic()
        with pytest.raises(AddressError, match=f"127.0.0.1:{stage.settings.port}.*--port"), running(stage.settings):
            pytest.fail("it must not start")
        assert time.monotonic() - began < 1
    assert stage.started() == {}


def test_a_part_that_ends_later_ends_the_wait(stage: Stage) -> None:
    with running(stage.settings, quiet()) as cluster:
        cluster.processes[1].popen.kill()
        with pytest.raises(ClusterError, match=r"decode-0 was killed \(SIGKILL\)"):
            cluster.wait()
    assert stage.nothing_left()


# --- cores ---


@pytest.mark.parametrize(
    ("prefill", "decode", "cores", "wanted"),
    [
        (1, 2, [0], ["0", "0", "0"]),
        (1, 3, [0, 1], ["0", "0", "1", "0"]),
        (1, 2, [0, 1], ["0", "0", "1"]),
        (3, 2, [0, 1], ["0", "1", "0", "0", "1"]),
        (1, 2, [0, 1, 2], ["2", "0", "1"]),
        (1, 2, [0, 1, 2, 3], ["2,3", "0", "1"]),
        (1, 2, [0, 1, 2, 3, 4], ["4", "0,1", "2,3"]),
        (2, 1, [4, 6, 8], ["8", "8", "4,6"]),
        (2, 2, [0, 1, 2, 3], ["2", "3", "0", "1"]),
        (0, 2, [0, 1, 2], ["0", "1"]),
        (1, 1, [3], ["3", "3"]),
    ],
)
def test_core_bindings(prefill: int, decode: int, cores: list[int], wanted: list[str]) -> None:
    assert core_bindings(prefill, decode, cores) == wanted


def test_decode_instances_never_share_cores() -> None:
    for prefill, decode, count in itertools.product(range(3), range(1, 5), range(1, 20)):
        bindings = core_bindings(prefill, decode, list(range(count)))
        assert len(bindings) == prefill + decode
        if count < decode:
            continue
        mine = [core for binding in bindings[prefill:] for core in binding.split(",")]
        assert len(mine) == len(set(mine))
        assert len({len(binding.split(",")) for binding in bindings[prefill:]}) == 1
        if count > decode:
            assert all(not set(binding.split(",")) & set(mine) for binding in bindings[:prefill])
