"""Forks instances from a process that has imported vLLM, around tests that start many of them (forked_engine.py).

Importing vLLM takes most of the CPU time of an instance's start. The server does it once, with one OpenMP thread and
no computation, and then forks for every client two processes: the instance, and a guard that waits for it.

- The instance takes the client's arguments, environment, folder, umask, standard streams, process group, and the
  namespaces of its network and mounts: a client of another host than the server's, in a test, starts an instance there.
- The client leaves that group, waits, passes signals on to the instance, and ends as the instance ends. So a signal to
  the group reaches the instance once, and so does one to the client.
- Where the client is killed, the guard kills the instance's group; where the guard is killed, the instance gets a
  SIGTERM.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# No variable of ARES: the gateway names those that it does not know.
SERVER_VARIABLE = "FORK_SERVER_SOCKET"
# What an instance imports until it serves; the others are small, or read its environment.
ENGINE_MODULES = (
    "ares.cli.main",
    "ares.engine.launcher",
    "ares.engine.vllm_api",
    "ares.engine.prediction.worker",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
)
_STREAMS = 3
# Of the mounts, too: UCX looks for network devices below /sys.
_NAMESPACES = ("/proc/self/ns/net", "/proc/self/ns/mnt")
_PR_SET_PDEATHSIG = 1
_PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT}
_LONGEST = 1 << 20


@contextlib.contextmanager
def running(
    log: Path, environment: Mapping[str, str], modules: Sequence[str] = ENGINE_MODULES
) -> Iterator[dict[str, str]]:
    """Run a server with an environment; yield the variables that have `forked_engine` start instances from it.

    The first clients wait until it has imported the modules.
    """
    # The path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ares-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/socket"
        listener.bind(path)
        listener.listen()
        with log.open("wb") as sink:
            server = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "ares_dev.fork_server", str(listener.fileno()), *modules],
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                process_group=0,
                pass_fds=[listener.fileno()],
            )
        listener.close()  # clients fail where the server has ended
        try:
            yield {SERVER_VARIABLE: path}
        finally:
            server.kill()
            server.wait()


def start(path: str, arguments: list[str]) -> int:
    """Start an instance from the server at a path, and return its exit status; a signal that ends it ends us too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "umask": umask,
        "group": os.getpgrp(),
    }
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        lines = stack.enter_context(connection.makefile())
        namespaces = [stack.enter_context(Path(name).open()).fileno() for name in _NAMESPACES]
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [*range(_STREAMS), *namespaces])
        started = json.loads(lines.readline())
        os.setpgid(0, started["group"])
        for number in _PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(started["instance"], number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        status = int(lines.readline())
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # that of SIGKILL cannot be set
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def serve(listener: socket.socket, modules: Sequence[str]) -> list[str]:
    """Fork instances for the clients of a listener; return the arguments of an instance, in its process."""
    _die_with_parent(signal.SIGKILL)
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector would write to pages that are shared with the instances
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for guards
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _guard(connection)
        connection.close()


def _guard(connection: socket.socket) -> list[str]:
    """Fork the instance of a client, and return its arguments there; here wait until one of the two ends."""
    body, descriptors, _, _ = socket.recv_fds(connection, _LONGEST, _STREAMS + len(_NAMESPACES))
    while not body.endswith(b"\n"):
        part = connection.recv(_LONGEST)
        if not part:
            os._exit(1)  # the client was killed
        body += part
    request = json.loads(body)
    group = os.getpgrp()
    instance = os.fork()
    # By both: whichever comes first, the client is told only then.
    os.setpgid(instance, request["group"])
    if instance == 0:
        connection.close()
        _become(request, descriptors)
        return list(request["arguments"])
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(instance)
    with contextlib.suppress(ConnectionError):
        connection.sendall(json.dumps({"instance": instance, "group": group}).encode() + b"\n")
    # The client sends nothing more: all that can be read is its end.
    readable, _, _ = select.select([ended, connection.fileno()], [], [])
    if ended not in readable:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(request["group"], signal.SIGKILL)
    _, status = os.waitpid(instance, 0)
    with contextlib.suppress(ConnectionError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Take what a new process would have from its parent."""
    _die_with_parent(signal.SIGTERM)
    for name, descriptor in zip(_NAMESPACES, descriptors[_STREAMS:], strict=True):
        _enter(name, descriptor)
    for target, descriptor in enumerate(descriptors[:_STREAMS]):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])


def _enter(name: str, namespace: int) -> None:
    """Enter a namespace, unless this process is in it: only that needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not os.path.samestat(Path(name).stat(), os.fstat(namespace)) and libc.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}", name)
    os.close(namespace)


def _die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent of this process ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    from ares_dev import forked_engine

    forked_engine.run(serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]))
