"""An instance as a replica of a deployment: a Ray actor that starts `ares worker`, watches it and says where it is."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from ares import addresses
from ares.free_ports import free_ports
from ares.instance_sources import http_url
from ares.ray.process import InstanceProcess

logger = logging.getLogger(__name__)

_ANNOUNCE_S = 1.0
_ANSWER_S = 5.0
# For a drained instance to end, and for its children.
END_S = 15.0


class Instance:
    """One instance; it is ready when its process answers, and healthy as long as that runs.

    Parameters
    ----------
    role
        prefill, decode or both.
    arguments
        Of `ares worker`, without name and addresses.
    start_timeout_s, drain_s
        How long it may take to start, and to let its requests go when it is stopped.
    directory
        Handle of the application's Directory.

    Raises
    ------
    ProcessError
        The process has not started; Serve tries again.
    AddressError
        Another one has taken its port; likewise.
    """

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, role: str, arguments: Sequence[str], start_timeout_s: float, drain_s: float, directory: Any
    ) -> None:
        import ray
        from ray import serve

        host = ray.util.get_node_ip_address()
        # HTTP and control. Chosen here, since the URL is to be known, and kept from other instances of this node: vLLM
        # loads for a minute before it listens.
        port = free_ports(host, 2)
        name = f"{role}-{serve.get_replica_context().replica_tag}"
        self._url = http_url(host, port)
        self._directory, self._drain_s = directory, drain_s
        self._announcing: asyncio.Task[None] | None = None
        with contextlib.ExitStack() as ports:
            for number in (port, port + 1):
                ports.enter_context(addresses.reserved(host, number))
            self._process = InstanceProcess(
                [
                    *("worker", "--role", role, "--name", name, "--host", host, "--drain-deadline", str(drain_s)),
                    *("--port", str(port), "--control-port", str(port + 1)),
                    *arguments,
                ],
                self._url,
            )
            await self._process.await_ready(start_timeout_s)
        self._announcing = asyncio.create_task(self._announce())

    def check_health(self) -> None:
        """Raise ProcessError where the process has ended: Serve then starts another replica."""
        self._process.check()

    async def __del__(self) -> None:
        """Drain and end the process (Serve calls this when it stops a replica)."""
        if self._announcing is not None:  # else it is stopped while it starts
            self._announcing.cancel()
        await self._process.stop(self._drain_s + END_S)
        with contextlib.suppress(Exception):  # the directory forgets it by itself
            async with asyncio.timeout(_ANSWER_S):
                await self._directory.withdraw.remote(self._url)

    async def _announce(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    await self._directory.announce.remote(self._url)
            except Exception as error:  # Ray's own; the next one may succeed
                logger.warning("the directory does not answer: %s: %s", type(error).__name__, error)
            await asyncio.sleep(_ANNOUNCE_S)
