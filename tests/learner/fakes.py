"""An instance that takes part in learning, over the real control channel, and a gateway that takes reports."""

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from ares.engine.control import ControlChannel
from ares.engine.learning import spool
from ares.engine.learning.folder import LearningFolder, version_of
from ares.engine.learning.service import LearningCommand, LearningService
from ares.free_ports import free_port
from ares.protocol import messages
from ares.protocol.fields import INSTANCE_ROUTE, MODELS_ROUTE
from ares.protocol.learner_report import LARGEST_REPORT_BYTES, Report
from tests.learner.synthetic import CONTEXT


class Instance:
    """An instance with a real control channel and learning folder, whose worker accepts every checkpoint.

    `predictor` is the version that it runs, `received` what it was sent; `refuses` is why it takes no checkpoint, and
    `worker_refuses` why its worker does not load one that has arrived.
    """

    def __init__(self, folder: Path, name: str = "decode-0", *, learns: bool = True, predictor: str = "") -> None:
        self.name, self.boot, self.learns = name, f"boot-of-{name}", learns
        self.address = self.url = self.refuses = self.worker_refuses = ""
        self._refused = ("", "")
        self.received: list[str] = []
        self.predictor = predictor
        self._folder = LearningFolder(folder / name)
        self._folder.prepare()
        self._handled = ""
        self._numbers = itertools.count()
        self._channel: ControlChannel | None = None

    def offer(self, data: bytes) -> None:
        """Let a shard wait for a learner."""
        path = self._folder.recorded / f"part-{next(self._numbers):012d}-00000000.safetensors"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(data)
        unfinished.replace(path)

    @property
    def waiting(self) -> int:
        """How many shards wait for a learner."""
        return len(spool.waiting(self._folder.recorded))

    def open(self) -> None:
        # Another one every time: what has been closed may be another process's meanwhile.
        self.address = f"tcp://127.0.0.1:{free_port('127.0.0.1', [])}"
        peer = messages.Peer("engine", "127.0.0.1", 1)
        versions = {"vllm": "fake"}
        hello = messages.Hello(self.name, "decode", self.boot, peer, 16, 100, CONTEXT, versions, learns=self.learns)
        learning = Refusing(self) if self.learns else None
        self._channel = ControlChannel(self.address, hello, self._telemetry, learning=learning)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def service(self) -> LearningService:
        return LearningService(self._folder, self.predictor)

    def _telemetry(self) -> messages.Telemetry:
        wanted = self._folder.wanted()
        if wanted is not None and wanted.order != self._handled:
            self._handled = wanted.order
            if wanted.version:
                assert version_of(self._folder.incoming(wanted.version)) == wanted.version
            self.received.append(wanted.version)
            if self.worker_refuses:
                self._refused = (wanted.version, self.worker_refuses)
            else:
                self.predictor = wanted.version
        return messages.Telemetry(
            0, 0, 0, 0, 0, 0.0, 0, 0, [], predictor=self.predictor, predictor_refused=self._refused
        )


class Refusing(LearningService):
    """The service of an instance, which refuses checkpoints while `refuses` is set."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._real = instance.service()

    def answer(self, command: LearningCommand) -> messages.Event:
        if isinstance(command, messages.CheckpointPart) and self._instance.refuses:
            return messages.CheckpointReceived(command.call, refused=self._instance.refuses)
        return self._real.answer(command)


@asynccontextmanager
async def serving(instance: Instance) -> AsyncIterator[Instance]:
    """The instance, on its control channel and over HTTP."""

    async def describe(_: web.Request) -> web.Response:
        return web.json_response(
            {"name": instance.name, "role": "decode", "boot": instance.boot, "control_address": instance.address}
        )

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": []})

    app = web.Application()
    app.add_routes([web.get(INSTANCE_ROUTE, describe), web.get(MODELS_ROUTE, models)])
    instance.open()
    try:
        async with _listening(app) as instance.url:
            yield instance
    finally:
        instance.close()


class Gateway:
    """A gateway's admin routes: it names instances, and keeps the reports."""

    def __init__(self) -> None:
        self.instances: list[Instance] = []
        self.reports: list[dict[str, Any]] = []
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Gateway"]:
        async def status(_: web.Request) -> web.Response:
            return web.json_response({"instances": [{"name": i.name, "url": i.url} for i in self.instances]})

        async def report(request: web.Request) -> web.Response:
            body = await request.read()
            Report.model_validate_json(body)  # a gateway refuses what it does not know
            self.reports.append(json.loads(body))
            return web.json_response({})

        app = web.Application(client_max_size=LARGEST_REPORT_BYTES)
        app.add_routes([web.get("/admin/v1/status", status), web.put("/admin/v1/predictor", report)])
        async with _listening(app) as self.url:
            yield self


@asynccontextmanager
async def _listening(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
