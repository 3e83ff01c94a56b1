"""`ares up` keeps serving: processes that end are restarted, and every change is printed."""

import signal
import subprocess
import time
from collections.abc import Callable

from ares.local_cluster.cluster import GATEWAY, Cluster, ClusterError, ManagedProcess
from ares.local_cluster.restarts import RestartPolicy, Restarts, State

_CHECK_S = 0.2
_DEFAULT = RestartPolicy()


class Supervisor:
    """Restarts the processes of a running cluster when they end."""

    def __init__(
        self, cluster: Cluster, policy: RestartPolicy = _DEFAULT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._restarts = [(process, Restarts(policy, clock())) for process in cluster.processes]

    def run(self) -> None:
        """Watch the processes; call it on the main thread (`Cluster.restart`).

        Raises
        ------
        ClusterError
            Nothing is left that can serve.
        """
        while True:
            self.check()
            time.sleep(_CHECK_S)

    def check(self) -> None:
        """Check each process once, and restart what is due; ClusterError as for `run`."""
        for process, restarts in self._restarts:
            match restarts.state:
                case State.STARTING | State.READY if process.popen.poll() is not None:
                    self._ended(process, restarts)
                case State.STARTING:
                    self._starting(process, restarts)
                case State.WAITING if restarts.due(self._clock()):
                    self._start(process, restarts)

    def _ended(self, process: ManagedProcess, restarts: Restarts) -> None:
        how = process.ending() + (", and its streams are lost" if process.name == GATEWAY else "")
        process.clear()
        restarts.ended(self._clock())
        if restarts.state is State.WAITING:
            self._print(f"{process.name} {how}; it is started again in {restarts.delay_s:g} s (log: {process.log})")
            return
        self._print(
            f"{process.name} {how}; it has ended {restarts.in_row} times in a row and is given up; "
            f"the end of {process.log}:\n{process.log_end()}"
        )
        self._check_serving()

    def _start(self, process: ManagedProcess, restarts: Restarts) -> None:
        self._print(f"{process.name} starts again (try {restarts.in_row} of {restarts.policy.limit})")
        restarts.started(self._clock())
        try:
            self._cluster.restart(process)
        except (OSError, subprocess.SubprocessError) as error:
            self._print(f"{process.name} could not be started: {error}")  # it still counts as ended, once more

    def _starting(self, process: ManagedProcess, restarts: Restarts) -> None:
        took = self._clock() - restarts.since
        if process.ready():
            restarts.answered(self._clock())
            self._print(f"{process.name} is ready again after {took:.0f} s")
        elif took > self._cluster.settings.start_timeout_s:
            self._print(f"{process.name} is not ready after {took:.0f} s and is killed")
            process.send(signal.SIGKILL)
            process.popen.wait()

    def _check_serving(self) -> None:
        """Raise ClusterError if the gateway is given up, or every decode worker; decode workers can prefill, too."""
        given_up = [process.name for process, restarts in self._restarts if restarts.state is State.GIVEN_UP]
        decode = [process.name for process in self._cluster.workers if not process.name.startswith("prefill")]
        if GATEWAY in given_up or set(decode) <= set(given_up):
            raise ClusterError(
                f"nothing can be served without {', '.join(given_up)} (logs: {self._cluster.log_folder})"
            )

    def _print(self, line: str) -> None:
        self._cluster.console.print(line, markup=False, highlight=False, soft_wrap=True)
