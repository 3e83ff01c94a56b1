"""`/admin/v1/events`: the status once a second, made once for all viewers, as server-sent events.

An event `snapshot` is what `/admin/v1/status` returns, with the requests as columns and without the moves and the
reports of learners. An event `moves` has the moves that have ended since the one before, oldest first; the first one,
the last 200. An event `changes` has the changes of instances' states in the same way. An event `learners` has the
reports of all learners, when one is new. Every event is complete in itself: a reader that was away, or too slow,
continues with the next.
"""

import asyncio
import heapq
import logging
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request

from ares import __version__
from ares.gateway.http.admin import allowed
from ares.gateway.http.responses import EventStream, Write
from ares.gateway.http.schema import errors
from ares.gateway.models import Models
from ares.gateway.processes import together
from ares.gateway.processes.merged_status import Part
from ares.gateway.processes.siblings import Siblings
from ares.policy import PRESETS

logger = logging.getLogger(__name__)

# Of the status: what has events of its own, and what is for tests.
_ELSEWHERE = ("migrations", "learners", "process", "processes", "connectors")

router = APIRouter(prefix="/admin/v1", dependencies=[Depends(allowed)], responses=errors(401, 403))


@router.get("/events", response_class=EventStream, status_code=200)
async def events(request: Request) -> EventStream:
    """Stream the status until the client leaves or the gateway stops."""
    feed: Feed = request.app.state.feed
    return EventStream(feed.follow)


class Feed:
    """Makes the events; it runs only while there are viewers.

    Parameters
    ----------
    models
        The models of the gateway, in this process.
    siblings
        The other processes of the gateway, whose requests and moves are shown too.
    """

    def __init__(self, models: Models, siblings: Siblings | None = None) -> None:
        self._models = models
        gateway = self._gateway = models.first
        self._siblings = siblings
        self._tuning = gateway.tuning
        live = [name for name, one in PRESETS.items() if not one.knows_lengths]
        # That of the start may be a file.
        self._presets = list(dict.fromkeys([gateway.config.preset, *live]))
        self._viewers = 0
        self._clock: asyncio.Task[None] | None = None
        self._ticked = asyncio.Condition()
        self._closed = False
        self._number = 0
        self._snapshot = b""
        self._moves: deque[tuple[int, bytes]] = deque(maxlen=self._tuning.feed_moves)
        # By process, each with another name when it starts again: how many of its moves have been taken over.
        self._moves_taken: dict[str, int] = {}
        self._changes: deque[tuple[int, bytes]] = deque(maxlen=self._tuning.kept_changes)
        self._last_change = 0
        self._learners = b""
        self._learners_number = 0
        self._learners_revision = ("", 0)

    async def follow(self, write: Write) -> None:
        """Write events until cancelled or closed; a slow writer skips snapshots."""
        self._viewers += 1
        if self._clock is None:
            self._clock = asyncio.create_task(self._tick(), name="status feed")
        seen = 0
        try:
            while True:
                async with self._ticked:
                    while not self._closed and (not self._snapshot or self._number == seen):
                        await self._ticked.wait()
                if self._closed:
                    return
                body = _newer("moves", self._moves, seen) + _newer("changes", self._changes, seen)
                body += self._learners if self._learners_number > seen else b""
                seen = self._number
                await write(body + self._snapshot)
        finally:
            self._viewers -= 1
            if not self._viewers and self._clock is not None:
                self._clock.cancel()
                self._clock = None
                self._snapshot = b""

    async def close(self) -> None:
        """End all streams: a gateway that stops does not wait for viewers."""
        async with self._ticked:
            self._closed = True
            self._ticked.notify_all()

    async def _tick(self) -> None:
        while True:
            try:
                await self._make()
            except Exception:  # viewers miss one event; serving continues (I7)
                logger.exception("no status for the viewers")
            async with self._ticked:
                self._ticked.notify_all()
            await asyncio.sleep(self._tuning.feed_period_s)

    async def _make(self) -> None:
        limit = self._tuning.feed_moves
        parts = await together.parts(self._models, self._siblings, lambda name: self._moves_taken.get(name, 0), limit)
        whole = together.merge(self._models, parts)
        status = {name: value for name, value in whole.items() if name not in _ELSEWHERE}
        moves = self._new_moves(parts)
        requests: list[dict[str, Any]] = status.pop("requests")
        total = len(requests)
        if total > self._tuning.feed_requests:
            requests = heapq.nlargest(self._tuning.feed_requests, requests, key=lambda r: r["resident_tokens"])
        status |= {
            "version": __version__,
            "model": ", ".join(one.config.model for one in self._models),
            "model_name": self._gateway.names[0],
            "presets": self._presets,
            "client_keys": bool(self._gateway.config.api_keys),
            "requests_total": total,
            "requests": {name: [_short(r[name]) for r in requests] for name in (requests[0] if requests else ())},
        }
        self._snapshot = _event("snapshot", msgspec.json.encode(status))
        self._number += 1
        reported = min(parts, key=lambda part: part.process)
        revision = reported.gateway, reported.learners_revision
        if revision[1] and revision != self._learners_revision:
            self._learners_number, self._learners_revision = self._number, revision
            self._learners = _event("learners", msgspec.json.encode(reported.status["learners"]))
        self._moves.extend((self._number, msgspec.json.encode(move)) for move in moves)
        for change in self._gateway.pool.changes.since(self._last_change):
            self._changes.append((self._number, msgspec.json.encode(change)))
            self._last_change = change.number

    def _new_moves(self, parts: list[Part]) -> list[dict[str, Any]]:
        """Return the moves that have ended since the last event, the oldest first."""
        self._moves_taken |= {part.gateway: part.moves_ended for part in parts}
        new = [move for part in parts for move in part.status["migrations"]]
        return sorted(new, key=lambda move: move["started_at"])[-self._tuning.feed_moves :] if len(parts) > 1 else new


def _event(name: str, body: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + body + b"\n\n"


def _newer(name: str, bodies: Iterable[tuple[int, bytes]], seen: int) -> bytes:
    """Return an event with what came after a number; nothing where there is nothing."""
    newer = b",".join(body for number, body in bodies if number > seen)
    return _event(name, b"[" + newer + b"]") if newer else b""


def _short(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value
