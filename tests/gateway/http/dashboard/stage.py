"""The dashboard before a feed that a test plays by hand: any cluster, any number of requests, any fault."""

import asyncio
import contextlib
import copy
import json
import math
import random
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ares.gateway.http import dashboard
from ares.gateway.http.responses import EventStream, Write
from tests.gateway.fakes import free_port
from tests.waiting import eventually

FIELDS = (
    "id",
    "instance",
    "resident_tokens",
    "prompt_tokens",
    "output_tokens",
    "remaining_p10",
    "remaining_p50",
    "remaining_p90",
    "moves",
    "movable",
    "reason",
    "state",
)


class Show:
    """A made-up cluster that lives: requests grow and end, others come, some move."""

    def __init__(self, decode: int = 4, requests: int = 60, capacity: int = 56_000, seed: int = 7) -> None:
        self._random = random.Random(seed)
        self._names = [f"decode-{n}" for n in range(decode)]
        self._capacity = capacity
        self._born = 0
        self._preemptions = dict.fromkeys(self._names, 0)
        self.time = 1_780_000_000.0
        self.requests = [self._request(self._random.random()) for _ in range(requests)]
        self.moves: list[dict[str, Any]] = []

    def _request(self, age: float = 0.0) -> dict[str, Any]:
        self._born += 1
        prompt = int(self._random.lognormvariate(6.2, 0.9))
        total = max(8, int(self._random.lognormvariate(6.8, 1.1)))
        done = int(total * age)
        weights = [1.0 / (1 + n % 3) for n in range(len(self._names))]
        request = dict.fromkeys(FIELDS) | {
            "id": f"{self._random.getrandbits(48):012x}",
            "instance": self._random.choices(self._names, weights)[0],
            "prompt_tokens": prompt,
            "output_tokens": done,
            "moves": 0,
            "movable": True,
            "state": self._random.choices(["decode", "prefill", "waiting", "suspended"], [30, 1, 1, 1])[0],
            "total": total,
        }
        if request["state"] in {"prefill", "waiting"}:
            request |= {"instance": None, "output_tokens": 0, "movable": False, "reason": "not_decoding"}
        return self._predict(request)

    def _predict(self, request: dict[str, Any]) -> dict[str, Any]:
        left = request["total"] - request["output_tokens"]
        middle = left * self._random.lognormvariate(0, 0.15)
        request["resident_tokens"] = request["prompt_tokens"] + request["output_tokens"]
        request |= {"remaining_p10": round(middle * 0.4), "remaining_p50": round(middle)}
        return request | {"remaining_p90": round(middle * 2.1)}

    def step(self, tokens: int = 24) -> None:
        """Let a second go by."""
        self.time += 1
        for number, request in enumerate(self.requests):
            request["output_tokens"] += tokens if request["state"] in {"decode", "moving"} else 0
            if request["state"] != "decode" and self._random.random() < 0.2:
                request |= {"state": "decode", "reason": None, "movable": True}
                request["instance"] = request["instance"] or self._random.choice(self._names)
            ended = request["output_tokens"] >= request["total"]
            self.requests[number] = self._request() if ended else self._predict(request)
        self.moves = []
        if self._random.random() < 0.4:
            chosen = self._random.choice([r for r in self.requests if r["state"] == "decode"])
            self.moves = [self.move(chosen)]

    def move(self, request: dict[str, Any]) -> dict[str, Any]:
        """Move a request; return the record."""
        source = request["instance"] or self._names[0]
        target = self._random.choice([name for name in self._names if name != source] or self._names)
        good = self._random.random() < 0.9
        request |= {"instance": target if good else source, "moves": request["moves"] + good, "state": "moving"}
        peak = self._random.uniform(0.85, 1.2)
        self._preemptions[source] += self._random.random() < 0.1
        return {
            "request_id": request["id"],
            "source": source,
            "target": target,
            "reason": f"ares: predicted peak of {source} {peak:.2f} -> {peak - 0.17:.2f}, gain 0.031 > cost 0.004",
            "outcome": "moved" if good else "finished_first",
            "stall_s": self._random.uniform(0.04, 0.13) if good else None,
            "pulled_tokens": request["resident_tokens"] if good else None,
            "cut_s": 0.01,
            "accept_s": 0.01,
            "queued_s": 0.01,
            "started_at": self.time - self._random.random(),
        }

    def _instance(self, name: str, number: int) -> dict[str, Any]:
        here = [r for r in self.requests if r["instance"] == name and r["state"] != "suspended"]
        resident = sum(r["resident_tokens"] for r in here)
        left = sorted(((r["remaining_p50"], r["resident_tokens"]) for r in here), reverse=True)
        allocated, peak = 0, 0.0
        for count, (rest, tokens) in enumerate(left, 1):
            allocated += tokens
            peak = max(peak, allocated + count * rest)
        return {
            "name": name,
            "role": "decode",
            "url": f"http://10.0.0.{number}:8100",
            "healthy": True,
            "draining": False,
            "running": len(here),
            "waiting": int(resident > 0.97 * self._capacity),
            "resident_tokens": resident,
            "predicted_remaining_tokens": sum(r["remaining_p50"] for r in here),
            "predicted_peak_tokens": peak,
            "capacity_tokens": self._capacity,
            "kv_blocks_used": min(resident, self._capacity) // 16,
            "kv_blocks": self._capacity // 16,
            "pinned": 0,
            "step_time_s": 0.018 + 4e-8 * resident,
            "preemptions": self._preemptions.get(name, 0),
            "sessions": len(here),
        }

    def snapshot(self) -> dict[str, Any]:
        """Return the data of a `snapshot` event, as `feed.py` makes it."""
        noise = random.Random(int(self.time / 5))
        wave = 1 + 0.3 * math.sin(self.time / 40) + noise.uniform(-0.1, 0.1)
        prefill = self._instance("prefill-0", 99) | {"role": "prefill", "predicted_peak_tokens": None}
        spread = {"p50": 1, "p90": 1.9, "p99": 3.4}
        return {
            "preset": "ares",
            "instances": [prefill, *(self._instance(name, n) for n, name in enumerate(self._names))],
            "recent": {
                "window_s": 60.0,
                "ttft_s": {"count": 90} | {p: 0.21 * wave * factor for p, factor in spread.items()},
                "tpot_s": {"count": 80} | {p: 0.022 * wave * factor for p, factor in spread.items()},
                "longest_gap_s": {"count": 80} | {p: 0.05 * wave * factor for p, factor in spread.items()},
                "prediction_error_tokens": {
                    "count": 180,
                    "mean_absolute": 118 * wave,
                    "p90_absolute": 290 * wave,
                    "bias": -12.0,
                },
            },
            "now": self.time,
            "version": "0.1.0",
            "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
            "requests_total": len(self.requests),
            "requests": {name: [r[name] for r in self.requests] for name in FIELDS},
        }


class Stage:
    """Serves the page and one feed. `play` sends; the switches break it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.key: str | None = None
        self.given: list[str | None] = []
        """The Authorization header of every attempt to read the feed."""
        self.refusing = False
        self.viewers = 0
        self._snapshot: dict[str, Any] | None = None
        self._moves: list[dict[str, Any]] = []
        self._learners: list[dict[str, Any]] = []
        self._queues: set[asyncio.Queue[bytes | None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/dashboard"

    def play(self, show: Show, moves: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Send what the show looks like now."""
        snapshot = show.snapshot()
        self.send(snapshot, show.moves if moves is None else moves)
        return snapshot

    def send(
        self,
        snapshot: dict[str, Any],
        moves: list[dict[str, Any]] | None = None,
        learners: list[dict[str, Any]] | None = None,
        changes: list[dict[str, Any]] | None = None,
    ) -> None:
        """Send a snapshot, after these moves, reports and changes; who connects later gets moves and reports first."""
        self._snapshot = copy.deepcopy(snapshot)
        self._moves = (self._moves + (moves or []))[-200:]
        self._learners = copy.deepcopy(learners) or self._learners
        body = (_event("moves", moves) if moves else b"") + (_event("learners", learners) if learners else b"")
        body += (_event("changes", changes) if changes else b"") + _event("snapshot", snapshot)
        for queue in self._queues:
            queue.put_nowait(body)

    def hang_up(self) -> None:
        """End all streams."""
        for queue in self._queues:
            queue.put_nowait(None)

    async def _events(self, request: Request) -> Response:
        self.given.append(request.headers.get("authorization"))
        if self.refusing:
            return JSONResponse({"error": {"message": "closed for a test"}}, 503)
        if self.key is not None and self.given[-1] != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "the admin routes need their key"}}, 401)
        return EventStream(self._follow)

    async def _follow(self, write: Write) -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        if self._moves:
            queue.put_nowait(_event("moves", self._moves))
        if self._learners:
            queue.put_nowait(_event("learners", self._learners))
        if self._snapshot is not None:
            queue.put_nowait(_event("snapshot", self._snapshot))
        self._queues.add(queue)
        self.viewers += 1
        try:
            while (body := await queue.get()) is not None:
                await write(body)
        finally:
            self._queues.remove(queue)
            self.viewers -= 1

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Stage"]:
        """Serve."""
        app = FastAPI()
        app.include_router(dashboard.router)
        app.add_api_route("/admin/v1/events", self._events, response_model=None)
        config = uvicorn.Config(app, port=self.port, log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        task = asyncio.create_task(server.serve())
        await eventually(lambda: server.started)
        try:
            yield self
        finally:
            self.hang_up()
            server.should_exit = True
            await task


def _event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
