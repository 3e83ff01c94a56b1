"""The learner's process: it follows the instances, runs one job at a time, and reports to the gateways."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import aiohttp
from pydantic import SecretStr

from ares.learner import commands, report, running_job
from ares.learner.folder import Folder
from ares.learner.gateways import Gateway
from ares.learner.instances import Callbacks, Instance
from ares.learner.jobs import Progress
from ares.learner.learning import Learning
from ares.learner.recorded import OTHER_INTERVAL, OTHER_MODEL, OTHER_WIDTH, Store
from ares.learner.settings import Keys, LearnerSettings
from ares.learner.shipped import by_version
from ares.learner.versions import DamagedError
from ares.learner.work import Kind, Work
from ares.protocol.keys import ControlKey
from ares.protocol.learner_report import LONGEST_NAME

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_DOING = {Kind.TRAINING: "training", Kind.TRIAL: "trial", Kind.CHECK: "checking"}


class Learner:
    """A learner over a locked folder.

    Parameters
    ----------
    settings, keys
        As resolved.
    show
        Called with a line about what it does, whenever that changes.

    Attributes
    ----------
    learning
        Its decisions.

    Raises
    ------
    LearnerError
        The folder cannot be used.
    PredictorError
        A given checkpoint is none.
    """

    def __init__(self, settings: LearnerSettings, keys: Keys, show: Callable[[str], None] = lambda _: None) -> None:
        self.learning = Learning(Folder(settings.folder), settings, by_version(settings.checkpoints))
        self._settings = settings
        self._key = ControlKey(keys.control_key.get_secret_value()) if keys.control_key is not None else None
        self._keys = keys
        self._show = show
        self._shown = ""
        self._instances: dict[str, tuple[Instance, asyncio.Task[None]]] = {}
        self._job: tuple[Work, asyncio.Task[None]] | None = None
        self._epoch = ""
        self._news = asyncio.Event()
        self._full = self._failing = False
        self._left_alone: set[tuple[str, str]] = set()

    async def run(self) -> None:
        """Work until cancelled."""
        self.learning.save()
        async with _http(self._keys.worker_api_key) as workers, _http(self._keys.admin_key) as admin:
            gateways = [Gateway(url, admin) for url in self._settings.gateways]
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._find(gateways, workers))
                    tasks.create_task(self._report(gateways))
                    tasks.create_task(self._work())
            finally:
                await self._stop()
                self.learning.save()

    @property
    def doing(self) -> str:
        """What it does now, in a word."""
        state = self.learning.state
        if self._job is not None:
            return _DOING[self._job[0].kind]
        if state.frozen:
            return "frozen"
        return "trial" if state.challenger is not None else "collecting"

    @property
    def instances(self) -> list[Instance]:
        """The instances that are connected."""
        return [instance for instance, _ in self._instances.values() if instance.hello is not None]

    # --- work ---

    async def _work(self) -> None:
        """Once a second: take commands, delete what is too much, and start what is due."""
        learning, settings = self.learning, self._settings
        while True:
            if commands.take(learning):
                self._news.set()
                self._end_training_where_frozen()
            used = self._job[0].files if self._job is not None else frozenset()
            learning.store.prune(settings.keep_bytes, settings.keep_days, used)
            if self._job is not None and self._job[1].done():
                if not self._job[1].cancelled():
                    self._job[1].result()
                self._job = None
            if self._job is None and (work := self._next()) is not None:
                self._job = (work, asyncio.ensure_future(self._run(work)))
                self._news.set()
            learning.save()
            self._show_doing()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._wakes()

    def _next(self) -> Work | None:
        """Return the work that is due; an error of planning is an event, and instances still get the champion."""
        try:
            work = self.learning.next()
        except Exception as error:  # such as for a recorded file that nobody has thought of
            if not self._failing:
                logger.exception("the next work cannot be planned; it is tried again every second")
                self.learning.add("error", f"nothing is trained or judged: planning failed: {error!r}")
            self._failing = True
            return None
        self._failing = False
        return work

    async def _wakes(self) -> None:
        """Wait for the end of the job, if there is one."""
        if self._job is None:
            await asyncio.Event().wait()
        else:
            await asyncio.wait([self._job[1]])

    def _end_training_where_frozen(self) -> None:
        if self._job is not None and self._job[0].kind is Kind.TRAINING and self.learning.state.frozen:
            self._job[1].cancel()
            self.learning.ended()

    async def _run(self, work: Work) -> None:
        self._epoch = ""
        try:
            result = await running_job.run(work.job, self._settings.job_timeout_s, self._on_epoch)
            self.learning.done(work, result)
        except (running_job.JobError, OSError) as error:
            self.learning.failed(work, str(error))
        except Exception as error:  # as in `_next`
            logger.exception("the result of a job cannot be used")
            self.learning.failed(work, repr(error))
        self._news.set()

    def _on_epoch(self, progress: Progress) -> None:
        self._epoch = f", epoch {progress.epoch}: validation CRPS {progress.validation_crps:.1f}"
        self._show_doing()

    def _show_doing(self) -> None:
        planner = self.learning.planner
        waiting = f": {planner.have:,} of {planner.needed:,} outputs" if self._job is None and planner.needed else ""
        line = f"{self.doing}{waiting}{self._epoch if self.doing == 'training' else ''}"
        if line != self._shown:
            self._shown = line
            self._show(line)

    # --- instances ---

    async def _find(self, gateways: list[Gateway], http: aiohttp.ClientSession) -> None:
        callbacks = Callbacks(self._take, self._wanted, self._data, self._refused, self._claim)
        while True:
            urls, complete = list(self._settings.workers), True
            for gateway in gateways:
                found = await gateway.instances()
                urls += found or ()
                complete &= found is not None
            for url in urls:
                if url not in self._instances:
                    name = self.learning.state.name
                    instance = Instance(url, name, http, self._key, self._settings, callbacks)
                    self._instances[url] = (instance, asyncio.ensure_future(instance.follow()))
            for url, (instance, task) in list(self._instances.items()):
                if (complete and url not in urls and instance.hello is None) or task.done():
                    task.cancel()
                    del self._instances[url]
                    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                        logger.error("%s: %r; it is looked for again", instance.name, error)
            await asyncio.sleep(self._settings.find_s)

    def _take(self, instance: Instance, data: bytes) -> bool:
        assert instance.hello is not None  # noqa: S101 - for the type checker: it is connected
        store = self.learning.store
        dropped = store.dropped.total()
        try:
            store.take(data, instance.hello.max_model_len)
        except OSError as error:
            if not self._full:
                logger.warning("recorded states cannot be stored: %s; they wait at the instances", error)
            self._full = True
            return False
        if self._full:
            logger.info("recorded states can be stored again")
        self._full = False
        if (count := store.dropped.total()) > dropped and count.bit_count() == 1:  # 1, 2, 4, 8 ... of them
            reasons = ", ".join(f"{why} ({n})" for why, n in store.dropped.most_common())
            logger.warning("%s: dropped %d shards so far: %s%s", instance.name, count, reasons, _advice(store))
        return True

    def _wanted(self, instance: Instance, running: str) -> str | None:
        self.learning.found_at(instance.name, running)
        wanted = self.learning.wanted(running)
        if wanted is None and (instance.name, running) not in self._left_alone:
            self._left_alone.add((instance.name, running))
            logger.warning(
                "%s runs a checkpoint that this learner does not know (%s): it is left alone until a version of this "
                "learner has been promoted; name its file with --checkpoint to begin with it",
                instance.name,
                running[:12],
            )
        return wanted

    def _data(self, version: str) -> bytes:
        try:
            return self.learning.versions.data(version)
        except DamagedError:
            if version in self.learning.versions:  # not for every instance anew
                self.learning.lost(version)
            raise

    def _refused(self, instance: Instance, version: str, why: str) -> None:
        self.learning.add(
            "refused", f"{instance.name} has refused {version[:12] or 'to run without a checkpoint'}: {why}", version
        )
        self._news.set()

    def _claim(self, instance: Instance, boot: str) -> bool:
        return not any(
            other.boot == boot and other.hello is not None
            for other, _ in self._instances.values()
            if other is not instance
        )

    # --- reports ---

    async def _report(self, gateways: list[Gateway]) -> None:
        while gateways:
            running = {
                instance.name.strip()[:LONGEST_NAME] or instance.url: instance.running or ""
                for instance in self.instances
            }
            body = report.encoded(report.build(self.learning, self.doing, running))
            self._news.clear()
            await asyncio.gather(*(gateway.report(body) for gateway in gateways))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.report_s):
                    await self._news.wait()

    async def _stop(self) -> None:
        tasks = [task for _, task in self._instances.values()]
        tasks += [self._job[1]] if self._job is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(settings: LearnerSettings, keys: Keys, show: Callable[[str], None] = lambda _: None) -> None:
    """Run a learner until it is interrupted.

    Raises
    ------
    LearnerError
        Another one works on the folder, or it cannot be used.
    """
    with Folder(settings.folder).locked():
        asyncio.run(_until_interrupted(settings, keys, show))


async def _until_interrupted(settings: LearnerSettings, keys: Keys, show: Callable[[str], None]) -> None:
    await Learner(settings, keys, show).run()


def _advice(store: Store) -> str:
    """Return what to do about shards that were dropped for what they come from; empty where that is not why."""
    if not store.dropped.keys() & {OTHER_MODEL, OTHER_WIDTH, OTHER_INTERVAL}:
        return ""
    known = store.accepted
    return (
        f"; this folder learns from states of {known.model} of width {known.hidden_size}, one every {known.every} "
        "tokens: start the instances so, or a learner with another --folder for the others"
    )


def _http(key: SecretStr | None) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {}
    return aiohttp.ClientSession(headers=headers)
