"""What a process answers for all processes of its address: status, metrics, and which one has a request."""

import asyncio
import os
import urllib.parse
from collections.abc import Callable

import msgspec

from ares.gateway.http import status as own_status
from ares.gateway.http.request_ids import resolve
from ares.gateway.models import Models
from ares.gateway.processes import kept_metrics, merged_metrics, merged_status
from ares.gateway.processes.merged_status import Part, Status
from ares.gateway.processes.siblings import METRICS_ROUTE, REQUESTS_ROUTE, STATUS_ROUTE, Siblings
from ares.gateway.records import gauges
from ares.gateway.records.model_label import exposition

_decode_part = msgspec.json.Decoder(Part).decode
_decode_ids = msgspec.json.Decoder(list[str]).decode


def own_part(models: Models, moves_after: int = 0, most_moves: int | None = None) -> Part:
    """Return what this process knows, without its first `moves_after` moves, and at most so many of the others."""
    gateway = models.first
    new = max(0, gateway.migrations.ended - moves_after)
    return Part(
        gateway.counts.process,
        os.getpid(),
        gateway.name,
        own_status.whole(models, new if most_moves is None else min(new, most_moves)),
        own_status.recent(models).values(),
        gateway.migrations.ended,
        gateway.learners.revision,
    )


async def parts(
    models: Models,
    siblings: Siblings | None,
    moves_after: Callable[[str], int] = lambda _: 0,
    most_moves: int | None = None,
) -> list[Part]:
    """Return what each process knows that answers, this one first.

    Parameters
    ----------
    moves_after
        How many moves of a process, by its name, are left out.
    most_moves
        And of the others so many are kept at most.
    """
    found = [own_part(models, moves_after(models.first.name), most_moves)]
    if siblings is not None:
        names = siblings.counts.gateway_of
        answers = await siblings.ask_all(lambda process: f"{STATUS_ROUTE}?moves_after={moves_after(names(process))}")
        found += [_decode_part(answer.body) for answer in answers.values()]
    return found


def merge(models: Models, found: list[Part]) -> Status:
    """Return the status of the address by what its processes know."""
    gateway = models.first
    if gateway.counts.processes == 1:
        return found[0].status
    return merged_status.merged(found, gateway.counts.address_name, gateway.tuning.kept_migrations)


async def status(models: Models, siblings: Siblings | None) -> Status:
    """Return the status of the address, or of this process where a sibling asks."""
    if siblings is None:
        return own_status.whole(models)
    return merge(models, await parts(models, siblings))


async def running(models: Models, siblings: Siblings, given: str) -> list[tuple[str, int]]:
    """Return the running requests that `given` means (`request_ids.resolve`), each with its process.

    Raises
    ------
    SiblingRefusedError
        None was found, and not all processes have answered.
    """
    found = [(one, siblings.counts.process) for one in resolve(given, models.sessions)]
    path = f"{REQUESTS_ROUTE}?{urllib.parse.urlencode({'given': given})}"
    answers = await siblings.ask_all(lambda _: path)
    for process, answer in answers.items():
        found += [(one, process) for one in _decode_ids(answer.body)]
    if not found and (silent := {*siblings.counts.others} - {*answers}):
        raise siblings.unavailable(min(silent))
    # Each has answered by its own; an exact id of one counts before a beginning of another's.
    meant = resolve(given, {one for one, _ in found})
    return [(one, process) for one, process in found if one in meant]


def _own_metrics(models: Models) -> str:
    for gateway in models:
        # What learners report is shown once.
        learners = gateway.learners.newest_first() if gateway is models.first else ()
        gauges.update(gateway.metrics, gateway.pool.instances, learners)
    return exposition({gateway.names[0]: gateway.metrics.registry for gateway in models})


async def process_metrics(models: Models, siblings: Siblings) -> str:
    """Return the exposition of this process and of those that it replaced."""
    async with siblings.showing_metrics:
        own = _own_metrics(models)
        # In a thread, as the merging below: it may take long, and streams are not to wait.
        return await asyncio.to_thread(
            kept_metrics.with_ended, siblings.folder, siblings.counts.process, own, siblings.ended_metrics
        )


async def metrics(models: Models, siblings: Siblings | None) -> str:
    """Return the exposition of the address, or of this process where there are no others."""
    if siblings is None:
        return _own_metrics(models)
    counts = siblings.counts
    own, answers = await asyncio.gather(process_metrics(models, siblings), siblings.ask_all(lambda _: METRICS_ROUTE))
    texts = {counts.process: own} | {process: answer.body.decode() for process, answer in answers.items()}
    kept = [kept_metrics.read(siblings.folder, process) for process in counts.others if process not in texts]
    return await asyncio.to_thread(merged_metrics.of_address, texts, kept, counts.process, counts.restarts)
