"""`ares up`: a cluster on this machine, with nothing left of it afterwards."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from ares import addresses, extras
from ares.engine import front_end_flags
from ares.engine.defaults import gpus_per_instance, is_cpu_build, limits_memory
from ares.free_ports import free_port, free_ports
from ares.local_cluster import gpu_discovery
from ares.local_cluster.gpus import Assignment, GpuError, GpuRequest, Gpus, assign
from ares.protocol.messages import Role
from ares.terminal.http_client import open_direct
from ares.terminal.progress import progress_display

_DEFAULT_DECODE = 2
# The kernel takes a while to free the memory of a large engine.
_CLEAR_TIMEOUT_S = 10.0
_LOG_LINES = 25
_PR_SET_PDEATHSIG = 1
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# Everything stops together: an instance must not wait for its requests to move to instances that stop, too.
_AT_ONCE = ["--drain-deadline", "0"]
GATEWAY, LEARNER = "gateway", "learner"
_GATEWAY_AT_ONCE = ["--shutdown-timeout-s", "0"]


class ClusterError(RuntimeError):
    """The cluster cannot start; the message says which process and shows the end of its log."""


@dataclass(slots=True)
class ManagedProcess:
    """One process of the cluster.

    Attributes
    ----------
    instances
        Name and URL of each instance in it.
    url
        Where it answers; empty for a learner, which does not.
    cleared
        Whether it has ended with all of its children; its process group may belong to others by now.
    """

    name: str
    url: str
    log: Path
    command: list[str]
    environment: dict[str, str] | None
    popen: subprocess.Popen[bytes]
    instances: dict[str, str] = field(default_factory=dict)
    cleared: bool = False

    def ready(self) -> bool:
        """Whether it answers, or runs if it answers nobody."""
        if not self.url:
            return self.popen.poll() is None
        with contextlib.suppress(OSError), open_direct(f"{self.url}/health", timeout=1) as reply:
            return bool(reply.status == 200)
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and all of its children."""
        if not self.cleared:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, number)

    def clear(self) -> None:
        """Kill its remaining children when it has ended itself: an engine core would keep its ports and memory."""
        deadline = time.monotonic() + _CLEAR_TIMEOUT_S
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while not self.cleared and time.monotonic() < deadline:
                os.killpg(self.popen.pid, signal.SIGKILL)
                time.sleep(0.02)
        self.cleared = True

    def ending(self) -> str:
        """Return how it ended, as the end of a sentence."""
        code = self.popen.returncode
        if code >= 0:
            return f"ended with status {code}"
        # A real-time signal has no name.
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        return f"was killed ({name})"

    def log_end(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-_LOG_LINES:])


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What a local cluster consists of.

    Attributes
    ----------
    decode
        Decode instances; None: as many as fit on the GPUs (`with_gpus`).
    vllm_flags, prefill_flags, decode_flags
        Flags of vLLM for all instances, and for the gateway those of its front end; and further ones by role.
    simulate
        Profile of mock engines; None starts real ones.
    per_process
        Mock instances in a process: 1 as for real ones; None puts all of a role into one.
    share_gpus
        Whether several instances may run on one GPU.
    gpus, gpu_variables
        Which instance gets which GPUs, and the variables that tell it; None until `with_gpus` has looked.
    learn_folder, learner_flags
        Where a learner works (docs/learning.md), and the instances' own folders for it are; and its flags. None: there
        is none.
    tls
        Whether the gateway speaks TLS, which only its variables and `gateway_flags` tell it to.
    gateway_module, worker_module
        The modules whose commands `gateway` and `worker` are started: others for measurements and tests.
    start_timeout_s, stop_timeout_s
        How long a process may take until it answers, and how long all of them to end, before they are killed.
    """

    model: str
    prefill: int = 1
    decode: int | None = _DEFAULT_DECODE
    host: str = "127.0.0.1"
    port: int = 8000
    preset: str = "ares"
    log_folder: Path | None = None
    vllm_flags: tuple[str, ...] = ()
    worker_flags: tuple[str, ...] = ()
    gateway_flags: tuple[str, ...] = ()
    prefill_flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    simulate: str | None = None
    per_process: int | None = None
    share_gpus: bool = False
    gpus: Assignment | None = None
    gpu_variables: tuple[str, ...] = ()
    learn_folder: Path | None = None
    learner_flags: tuple[str, ...] = ()
    tls: bool = False
    gateway_module: str = "ares"
    worker_module: str = "ares"
    start_timeout_s: float = 600.0
    stop_timeout_s: float = 10.0

    def flags(self, role: Role) -> tuple[str, ...]:
        """Return vLLM's flags for an instance; of those that are given twice, vLLM takes the last."""
        given = front_end_flags.split(self.vllm_flags).instance_flags(mock=self.simulate is not None)
        return (*given, *(self.prefill_flags if role == "prefill" else self.decode_flags))


@dataclass(slots=True)
class Cluster:
    """A running local cluster. Use it as a context manager: leaving it stops everything."""

    settings: ClusterSettings
    console: Console
    log_folder: Path
    processes: list[ManagedProcess] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    # Sockets bound to the instances' ports without listening: an instance of vLLM loads for a minute before it binds
    # its ports, and other processes that look for free ports meanwhile, such as another cluster, must not find them.
    reserved_ports: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        return next(process.url for process in reversed(self.processes) if process.name == GATEWAY)

    @property
    def workers(self) -> list[ManagedProcess]:
        """The instances."""
        return [process for process in self.processes if process.name not in (GATEWAY, LEARNER)]

    def start_workers(self) -> None:
        """Start the instances of the settings."""
        settings = self.settings
        decode = _DEFAULT_DECODE if settings.decode is None else settings.decode
        if settings.simulate is not None:
            both: list[tuple[str, Role, int]] = [
                ("prefill", "prefill", settings.prefill),
                ("decode", "decode" if settings.prefill else "both", decode),
            ]
            for name, role, count in both:
                most = settings.per_process or count
                for n, first in enumerate(range(0, count, max(most, 1))):
                    if settings.per_process in (None, 1):
                        self.start_mock(name, role, most, first)
                    else:
                        self.start_mock(f"{name}-{n}", role, min(most, count - first))
            return
        roles: list[tuple[str, Role]] = [(f"prefill-{n}", "prefill") for n in range(settings.prefill)]
        roles += [(f"decode-{n}", "decode" if settings.prefill else "both") for n in range(decode)]
        bindings = core_bindings(settings.prefill, decode, sorted(os.sched_getaffinity(0)))
        given = settings.gpus
        shares = (*given.prefill_gpus, *given.decode_gpus) if given is not None else ()
        for (name, role), cores, gpus in zip(roles, bindings, shares or [()] * len(roles), strict=True):
            self.start_worker(name, role, cores, gpus=gpus)

    def start_gateway(self) -> None:
        """Start the gateway of the settings, before the instances that have been started."""
        settings = self.settings
        command = ["gateway", "--model", settings.model, "--preset", settings.preset]
        command += ["--host", settings.host, "--port", str(settings.port), *_GATEWAY_AT_ONCE]
        for worker in self.workers:
            for url in worker.instances.values():
                command += ["--worker", url]
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - a comparison
        # Clients call the model as the instances do, and the gateway renders their chats.
        command += front_end_flags.split(settings.vllm_flags).words()
        command += settings.gateway_flags
        self.start(
            GATEWAY,
            f"{'https' if settings.tls else 'http'}://{addresses.with_port(here, settings.port)}",
            command,
            module=settings.gateway_module,
        )

    def start_learner(self, folder: Path) -> None:
        """Start a learner for the running cluster."""
        command = ["predictor", "learn", "--gateway", self.url, "--folder", str(folder), "--model", self.settings.model]
        for worker in self.workers:
            for url in worker.instances.values():
                command += ["--worker", url]
        self.start(LEARNER, "", [*command, *self.settings.learner_flags])

    def start(
        self,
        name: str,
        url: str,
        arguments: list[str],
        gpus: tuple[str, ...] = (),
        instances: dict[str, str] | None = None,
        module: str = "ares",
    ) -> None:
        """Start one process, ``python -m MODULE ARGUMENTS``, that answers at `url`; by default it is one instance."""
        own = dict.fromkeys(self.settings.gpu_variables, ",".join(gpus)) if gpus else None
        environment = {**os.environ, **own} if own else None
        command = [sys.executable, "-m", module, *arguments]
        log = self.log_folder / f"{name}.log"
        with log.open("wb") as sink, _uninterrupted():
            popen = _spawn(command, environment, sink)
            self.processes.append(ManagedProcess(name, url, log, command, environment, popen, instances or {name: url}))

    def start_worker(
        self, name: str, role: Role, cores: str | None, flags: tuple[str, ...] = (), gpus: tuple[str, ...] = ()
    ) -> None:
        """Start an instance on these CPU cores or GPUs; `flags` are flags of `ares worker`."""
        extras.require("vllm", "nixl")  # one error here, not one in the log of each instance
        command = ["worker", "--model", self.settings.model, "--role", role, "--name", name, *_AT_ONCE]
        for flag in ("--port", "--control-port", "--nixl-port"):
            # Chosen here for all instances: they start at the same time and must not choose the same.
            self._reserve(free_port("127.0.0.1", self.ports))
            command += [flag, str(self.ports[-1])]
        if cores is not None:
            command += ["--cores", cores]
        if self.settings.learn_folder is not None:
            command += ["--learn", "--learn-folder", str(self.settings.learn_folder / "instances" / name)]
        self.start(
            name,
            f"http://127.0.0.1:{self.ports[-3]}",
            [*command, *flags, *self.settings.worker_flags, "--", *self.settings.flags(role)],
            gpus,
            module=self.settings.worker_module,
        )

    def start_mock(self, name: str, role: Role, count: int, number: int = 0) -> None:
        """Start `count` mock instances in one process, called `name` with numbers from `number` on."""
        # HTTP and control ports of all: processes that start at the same time must not choose the same ones.
        first = free_ports("127.0.0.1", 2 * count, self.ports)
        for port in range(first, first + 2 * count):
            self._reserve(port)
        names = [f"{name}-{number + n}" for n in range(count)]
        instances = {name: f"http://127.0.0.1:{first + n}" for n, name in enumerate(names)}
        command = ["worker", "--simulate", str(self.settings.simulate), "--model", self.settings.model]
        command += ["--role", role, "--name", name if count > 1 else names[0], "--port", str(first), *_AT_ONCE]
        command += ["--control-port", str(first + count)]
        flags = [*self.settings.worker_flags, "--", *self.settings.flags(role), "--instances", str(count)]
        process_name = names[0] if self.settings.per_process == 1 else name
        self.start(process_name, instances[names[-1]], [*command, *flags], instances=instances)

    def _reserve(self, port: int) -> None:
        self.reserved_ports.enter_context(addresses.reserved("127.0.0.1", port))
        self.ports.append(port)

    def restart(self, process: ManagedProcess) -> None:
        """Start a process that has ended again, as it was started; call it on the main thread (`_die_with_parent`)."""
        process.clear()
        with process.log.open("ab") as sink, _uninterrupted():
            process.popen = _spawn(process.command, process.environment, sink)
            process.cleared = False

    def await_workers(self) -> None:
        """Wait until all instances answer.

        Raises
        ------
        ClusterError
            One ended, or takes too long.
        """
        _await(self, self.workers, "engines")

    def await_gateway(self) -> None:
        """Wait until the gateway, the process that was started last, knows every instance; ClusterError as above."""
        _await(self, self.processes[-1:], "gateway", _gateway_ready(self))

    def check(self) -> None:
        """Raise ClusterError if a process has ended, other than a learner: nothing is served by it."""
        for process in self.processes:
            if process.popen.poll() is not None and process.name != LEARNER:
                raise ClusterError(f"{process.name} {process.ending()}; the end of {process.log}:\n{process.log_end()}")

    def wait(self) -> None:
        """Wait until a process ends."""
        while True:
            self.check()
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop every process with its children, and wait for it."""
        for process in reversed(self.processes):
            process.send(signal.SIGTERM)
        deadline = time.monotonic() + self.settings.stop_timeout_s
        for process in reversed(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.1, deadline - time.monotonic()))
        for process in self.processes:
            # Also where the leader has ended: vLLM's own children share its group.
            process.send(signal.SIGKILL)
            process.popen.wait()
        self.reserved_ports.close()


@contextlib.contextmanager
def workers_only(settings: ClusterSettings, console: Console | None = None) -> Iterator[Cluster]:
    """Yield an empty cluster to start instances in, and stop them at the end."""
    folder = settings.log_folder or Path(tempfile.mkdtemp(prefix="ares-"))
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(settings, console or Console(stderr=True), folder)
    try:
        yield cluster
    finally:
        cluster.stop()


@contextlib.contextmanager
def running(settings: ClusterSettings, console: Console | None = None) -> Iterator[Cluster]:
    """Start a cluster, wait until it serves, and stop it at the end.

    Raises
    ------
    ClusterError
        A process did not start.
    AddressError
        The gateway cannot listen on its address.
    GpuError
        The GPUs do not suffice.
    """
    settings = with_gpus(settings, os.environ, console)
    with workers_only(settings, console) as cluster:
        with addresses.reserved(settings.host, settings.port):
            cluster.start_workers()
            cluster.await_workers()
        cluster.start_gateway()
        cluster.await_gateway()
        if settings.learn_folder is not None:
            cluster.start_learner(settings.learn_folder)
        yield cluster


def with_gpus(
    settings: ClusterSettings, environment: Mapping[str, str], console: Console | None = None
) -> ClusterSettings:
    """Return the settings with the GPUs of each instance, and print which and why; those that have them unchanged.

    Raises
    ------
    GpuError
        The GPUs do not suffice.
    """
    if settings.gpus is not None:
        return settings
    prefill, decode = settings.flags("prefill"), settings.flags("decode")
    if settings.share_gpus and not all(map(limits_memory, [decode, *([prefill] if settings.prefill else [])])):
        raise GpuError(
            "--share-gpus: each instance would take most of a GPU's memory: give --gpu-memory-utilization, for example "
            "0.4 for two instances on a GPU, or --kv-cache-memory-bytes"
        )
    gpus = Gpus() if settings.simulate is not None or is_cpu_build() else gpu_discovery.find(environment)
    request = GpuRequest(
        settings.prefill,
        settings.decode,
        gpus_per_instance(prefill),
        gpus_per_instance(decode),
        settings.share_gpus,
    )
    assignment = assign(gpus, request)
    for line in assignment.reasons:
        (console or Console(stderr=True)).print(line, markup=False, highlight=False, soft_wrap=True)
    return replace(settings, decode=assignment.decode, gpus=assignment, gpu_variables=gpus.variables)


def core_bindings(prefill: int, decode: int, cores: list[int]) -> list[str]:
    """Return the cores of each instance, prefill first, as vLLM's binding strings.

    Each decode instance gets its own cores, since users notice its step time; prefill instances get the others.
    Where there are fewer cores than instances, each instance gets a single one, which several may share: the threads of
    a step wait for each other, and long where others keep their cores busy.
    """
    own = max(1, (len(cores) - (1 if len(cores) > decode else 0)) // decode)
    left = cores[decode * own :]
    dealt = _deal(left or cores, prefill, max(1, len(left) // max(prefill, 1))) + _deal(cores, decode, own)
    return [",".join(map(str, block)) for block in dealt]


def _deal(cores: list[int], count: int, each: int) -> list[list[int]]:
    return [[cores[(n * each + k) % len(cores)] for k in range(each)] for n in range(count)]


def _spawn(command: list[str], environment: dict[str, str] | None, sink: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own command
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT,
        # A separate process group, so that one signal reaches it with all its children and Ctrl-C reaches only us. Not
        # a separate session: the kernel divides a core between sessions (sched_autogroup_enabled), and has let the
        # prefill engine wait for seconds behind the decode engine on its core.
        process_group=0,
        preexec_fn=_prepare,  # noqa: PLW1509 - two calls into the kernel
    )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Defer signals that end us: a process that has been started but is not registered yet would be left running.

    Blocking alone is not enough: the kernel delivers a signal that this thread blocks to another one, of a library for
    example, and Python then still calls the handler on this thread. So the handlers are replaced as well.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    deferred: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in replaced:
            signal.signal(number, lambda number, _: deferred.append(number))
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        for taken in deferred:
            signal.raise_signal(taken)  # it is blocked here still
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare() -> None:
    """Prepare the child: it does not inherit the blocked signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    _die_with_parent()


def _die_with_parent() -> None:
    """Ask the kernel for a SIGTERM if the launcher is killed: nothing may outlive it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _await(
    cluster: Cluster,
    processes: list[ManagedProcess],
    what: str,
    ready: Callable[[ManagedProcess], bool] = ManagedProcess.ready,
) -> None:
    waiting = list(processes)
    timeout_s = cluster.settings.start_timeout_s
    deadline = time.monotonic() + timeout_s
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.fields[state]}"), TimeElapsedColumn())
    with progress_display(cluster.console, *columns, transient=True) as progress:
        tasks = {
            p.name: progress.add_task(p.name, total=1, state=f"starting (pid {p.popen.pid}, log: {p.log})")
            for p in processes
        }
        while waiting:
            cluster.check()
            for process in [p for p in waiting if ready(p)]:
                waiting.remove(process)
                progress.update(tasks[process.name], completed=1, state="ready")
            if time.monotonic() > deadline:
                names = ", ".join(p.name for p in waiting)
                raise ClusterError(
                    f"{what} not ready after {timeout_s:.0f} s (--start-timeout): {names}; the end of "
                    f"{waiting[0].log}:\n"
                    f"{waiting[0].log_end()}"
                )
            time.sleep(0.1)


def _gateway_ready(cluster: Cluster) -> Callable[[ManagedProcess], bool]:
    """Return a check that the gateway knows every instance."""

    def ready(process: ManagedProcess) -> bool:
        with contextlib.suppress(OSError), open_direct(f"{process.url}/version", timeout=1) as reply:
            body: str = reply.read().decode()
            return all(f'"{name}"' in body for worker in cluster.workers for name in worker.instances)
        return False

    return ready
