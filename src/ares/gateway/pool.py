"""All the instances of a gateway."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import aiohttp

from ares.gateway.instances import Instance
from ares.keys import ControlKey

logger = logging.getLogger(__name__)


class Pool:
    """All instances of a gateway; `gateway` is its name, with which its keys begin."""

    def __init__(
        self,
        urls: list[str],
        http: aiohttp.ClientSession,
        interval_s: float,
        control_key: ControlKey | None = None,
        gateway: str = "",
    ) -> None:
        self.instances = [Instance(url, http, interval_s, control_key, gateway) for url in urls]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to watch every instance."""
        self._tasks = [
            asyncio.create_task(i.watch(self._acquaint, self._tell_apart), name=f"watch {i.url}")
            for i in self.instances
        ]

    async def stop(self) -> None:
        """Stop watching."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def prefill(self) -> Iterator[Instance]:
        """Yield the instances that prefill."""
        return (i for i in self.instances if i.role != "decode")

    def decode(self) -> Iterator[Instance]:
        """Yield the instances that decode."""
        return (i for i in self.instances if i.role != "prefill")

    def find(self, name: str) -> Instance | None:
        """Return the instance called `name`."""
        return next((i for i in self.instances if i.name == name), None)

    @property
    def ready(self) -> bool:
        """Whether there is at least one instance to decode on."""
        return any(i.open for i in self.decode())

    @property
    def carried(self) -> frozenset[str]:
        """State that no instance lets a request lose that comes to it."""
        known = [frozenset(i.hello.carries) for i in self.instances if i.hello is not None]
        return frozenset.intersection(*known) if known else frozenset()

    def _tell_apart(self) -> None:
        """Give instances that call themselves the same their addresses as part of their names."""
        for called, count in Counter(i.called for i in self.instances).items():
            if count > 1:
                same = [i for i in self.instances if i.called == called]
                for instance in same:
                    instance.name = f"{called}@{urlsplit(instance.url).netloc}"
                logger.warning("%d instances call themselves %s: %s", count, called, ", ".join(i.name for i in same))

    async def _acquaint(self, instance: Instance) -> None:
        """Let decode instances shake hands with whatever they may pull from, so that no request waits for it."""
        assert instance.hello is not None  # noqa: S101 - for the type checker: called on its Hello
        if instance.role != "prefill":
            await instance.connect_peers([i.hello.peer for i in self.instances if i.hello and i is not instance])
        for other in self.decode():
            if other is not instance and other.hello is not None:
                await other.connect_peers([instance.hello.peer])
