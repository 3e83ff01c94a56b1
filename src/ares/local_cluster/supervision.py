"""`ares up` goes on serving: a process that ends is started again, and each change is a printed line."""

import signal
import subprocess
import time
from collections.abc import Callable

from ares.local_cluster import cluster as local
from ares.local_cluster.cluster import Cluster, ClusterError, Part
from ares.local_cluster.restarts import RestartPolicy, Restarts, State

_LOOK_S = 0.2
_DEFAULT = RestartPolicy()


class Supervisor:
    """Looks after the processes of a cluster that serves."""

    def __init__(
        self, cluster: Cluster, policy: RestartPolicy = _DEFAULT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._lives = [(part, Restarts(policy, clock())) for part in cluster.parts]

    def run(self) -> None:
        """Look after the processes; call it on the main thread (`Cluster.restart`).

        Raises
        ------
        ClusterError
            Nothing is left that can serve.
        """
        while True:
            self.look()
            time.sleep(_LOOK_S)

    def look(self) -> None:
        """Look at each process once, and do what is due; ClusterError as `run`."""
        for part, life in self._lives:
            match life.state:
                case State.STARTING | State.READY if part.process.poll() is not None:
                    self._ended(part, life)
                case State.STARTING:
                    self._starting(part, life)
                case State.WAITING if life.due(self._clock()):
                    self._start(part, life)

    def _ended(self, part: Part, life: Restarts) -> None:
        how = part.ending() + (", and its streams are lost" if part.name == "gateway" else "")
        part.clear()
        life.ended(self._clock())
        if life.state is State.WAITING:
            self._say(f"{part.name} {how}; it is started again in {life.delay_s:g} s (log: {part.log})")
            return
        self._say(
            f"{part.name} {how}; it has ended {life.in_row} times in a row and is given up; "
            f"the end of {part.log}:\n{part.log_end()}"
        )
        self._check_serving()

    def _start(self, part: Part, life: Restarts) -> None:
        self._say(f"{part.name} starts again (try {life.in_row} of {life.policy.limit})")
        life.started(self._clock())
        try:
            self._cluster.restart(part)
        except (OSError, subprocess.SubprocessError) as error:
            self._say(f"{part.name} could not be started: {error}")  # it has ended still, which counts once more

    def _starting(self, part: Part, life: Restarts) -> None:
        took = self._clock() - life.since
        if part.ready():
            life.answered(self._clock())
            self._say(f"{part.name} is ready again after {took:.0f} s")
        elif took > local.START_TIMEOUT_S:
            self._say(f"{part.name} is not ready after {took:.0f} s and is killed")
            part.send(signal.SIGKILL)
            part.process.wait()

    def _check_serving(self) -> None:
        """Raise ClusterError where the gateway is given up, or every decode worker is; these prefill too if need be."""
        given_up = [part.name for part, life in self._lives if life.state is State.GIVEN_UP]
        decode = [part.name for part in self._cluster.workers if not part.name.startswith("prefill")]
        if "gateway" in given_up or set(decode) <= set(given_up):
            raise ClusterError(
                f"nothing can be served without {', '.join(given_up)} (logs: {self._cluster.log_folder})"
            )

    def _say(self, line: str) -> None:
        self._cluster.console.print(line, markup=False, highlight=False, soft_wrap=True)
