"""Mixed traffic: users who stream, wait, leave, send bad requests, and read metrics and dashboard, until stopped."""

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ares.bench import sse
from ares.bench.live.load import random_prompt
from ares_dev.soak.cases import KNOWN_TOKENS, Case, Outputs, compare, request_whole

_LONGEST_PAUSE_S = 0.5
_FEED_S = 4.0
_REMEMBERED = 50
# Each is refused with a status below 500 and an error in OpenAI's form.
_BAD: tuple[tuple[str, Any], ...] = (
    ("completions", b"{"),
    ("completions", b"\xff\xfe"),
    ("completions", {"prompt": ""}),
    ("completions", {"prompt": "a", "model": "nobody"}),
    ("completions", {"prompt": "a", "max_tokens": -1}),
    ("completions", {"prompt": "a", "temperature": "hot"}),
    ("completions", {"prompt": [1 << 40]}),
    ("completions", {"prompt": [1000] * 40_000}),
    ("completions", {"prompt": "a", "n": 1_000_000}),
    ("chat/completions", {"messages": []}),
    ("chat/completions", {"messages": "hello"}),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": "perhaps"}),
    ("nothing", {}),
)
# What is read whole, often and by many.
_PAGES = (
    *("/metrics", "/health", "/ready", "/v1/models", "/version", "/admin/v1/status"),
    *("/dashboard", "/dashboard/dashboard.js", "/dashboard/dashboard.css"),
)


@dataclass(slots=True)
class TrafficCounts:
    """What happened so far, in bounded memory."""

    done: Counter[str] = field(default_factory=Counter)
    outputs: Counter[str] = field(default_factory=Counter)
    tokens_checked: int = 0
    tokens: int = 0
    failed: int = 0
    failures: deque[str] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    differences: deque[str] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def check(self, what: str, got: Outputs, expected: Outputs, tokens: int, *, whole: bool) -> None:
        """Compare outputs with the first tokens of the known ones; where the client left, only what came."""
        for index in range(len(expected)):
            ids = got.get(index, [])
            verdict = compare(ids, expected[index][: tokens if whole else len(ids)])
            self.outputs[verdict] += 1
            self.tokens_checked += len(ids)
            if verdict != "right":
                self.differences.append(f"{what}, choice {index}, {len(ids)} of {tokens} tokens: {verdict}")

    def fail(self, what: str, why: object) -> None:
        """Count something that should have worked."""
        self.failed += 1
        self.failures.append(f"{what}: {why}")


class Traffic:
    """Users of one gateway.

    Parameters
    ----------
    expected
        Outputs of each case, by its name.
    """

    def __init__(
        self, http: aiohttp.ClientSession, url: str, model: str, cases: list[Case], expected: dict[str, Outputs]
    ) -> None:
        self.counts = TrafficCounts()
        self._http = http
        self._url = url
        self._model = model
        self._cases = cases
        self._expected = expected
        self._open = asyncio.Event()
        self._active = 0
        self._idle = asyncio.Event()
        self._numbers = itertools.count()
        self._users: list[asyncio.Task[None]] = []
        self._kinds: dict[str, tuple[int, Callable[[random.Random], Awaitable[None]]]] = {
            "stream": (42, self._stream),
            "whole": (14, self._whole),
            "leaves": (12, self._leave),
            "leaves at once": (6, self._leave_at_once),
            "sampled": (10, self._sampled),
            "bad request": (8, self._bad),
            "page": (6, self._page),
            "feed": (2, self._feed),
        }

    def start(self, users: int) -> None:
        """Start this many users."""
        self._open.set()
        self._users = [asyncio.create_task(self._user(number)) for number in range(users)]

    async def pause(self) -> None:
        """Let all users finish their requests, and start none."""
        self._open.clear()
        while self._active:
            self._idle.clear()
            await self._idle.wait()

    def resume(self) -> None:
        """Let the users send again."""
        self._open.set()

    async def stop(self) -> None:
        """Let all users finish their requests, and end them."""
        await self.pause()
        await self.leave()

    async def leave(self) -> None:
        """End all users at once."""
        for user in self._users:
            user.cancel()
        await asyncio.gather(*self._users, return_exceptions=True)

    async def _user(self, number: int) -> None:
        generator = random.Random(number)  # noqa: S311 - a workload, not a secret
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        while True:
            await self._open.wait()
            self._active += 1
            (kind,) = generator.choices(names, weights)
            try:
                await self._kinds[kind][1](generator)
                self.counts.done[kind] += 1
            except Exception as error:  # any failure counts, and the user continues
                self.counts.fail(kind, repr(error)[:300])
            finally:
                self._active -= 1
                self._idle.set()
            await asyncio.sleep(generator.random() * _LONGEST_PAUSE_S)

    def _pick(self, generator: random.Random) -> tuple[Case, int]:
        return generator.choice(self._cases), generator.randint(1, KNOWN_TOKENS)

    async def _read(self, case: Case, tokens: int, most: int | None = None) -> tuple[Outputs, int | None]:
        """Read a stream, or its first `most` tokens; return the tokens by choice, and their number by the usage."""
        got: Outputs = {}
        counted = None
        body = case.body_for(self._model, tokens, stream=True)
        name = f"{case.name}.{next(self._numbers)}"
        async with sse.open_stream(self._http, f"{self._url}/v1/{case.route}", body, name) as chunks:
            async for chunk in chunks:
                counted = chunk.usage.completion_tokens if chunk.usage is not None else counted
                for choice in chunk.choices:
                    got.setdefault(choice.index, []).extend(choice.token_ids or [])
                if most is not None and sum(map(len, got.values())) >= most:
                    break
        self.counts.tokens += sum(map(len, got.values()))
        return got, counted

    # --- what users do ---

    async def _stream(self, generator: random.Random) -> None:
        case, tokens = self._pick(generator)
        got, counted = await self._read(case, tokens)
        self.counts.check(f"stream of {case.name}", got, self._expected[case.name], tokens, whole=True)
        if counted != (came := sum(map(len, got.values()))):
            self.counts.fail("stream", f"{case.name}: {came} tokens came and the usage says {counted}")

    async def _whole(self, generator: random.Random) -> None:
        case, tokens = self._pick(generator)
        got = await request_whole(self._http, self._url, self._model, case, tokens)
        self.counts.tokens += sum(map(len, got.values()))
        self.counts.check(f"reply to {case.name}", got, self._expected[case.name], tokens, whole=True)

    async def _leave(self, generator: random.Random) -> None:
        case, tokens = self._pick(generator)
        got, _ = await self._read(case, tokens, most=generator.randint(1, tokens))
        self.counts.check(f"left stream of {case.name}", got, self._expected[case.name], tokens, whole=False)

    async def _leave_at_once(self, generator: random.Random) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(generator.random() * 0.4):
                await self._read(*self._pick(generator))

    async def _sampled(self, generator: random.Random) -> None:
        """Send a new prompt; of its output only the length is known."""
        tokens = generator.randint(1, KNOWN_TOKENS)
        prompt = random_prompt(generator, generator.choice((10, 100, 400, 900)))
        got, counted = await self._read(Case("sampled", {"prompt": prompt, "temperature": 0.9}), tokens)
        if not len(got.get(0, [])) == counted == tokens:
            self.counts.fail("sampled", f"{tokens} tokens wanted, {len(got.get(0, []))} came, the usage says {counted}")

    async def _bad(self, generator: random.Random) -> None:
        route, body = generator.choice(_BAD)
        sent: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": body}
        headers = {"Content-Type": "application/json"}
        async with self._http.post(f"{self._url}/v1/{route}", headers=headers, **sent) as reply:
            read = await reply.json()
        if not 400 <= reply.status < 500 or not read["error"]["message"]:
            self.counts.fail("bad request", f"{route} {str(body)[:40]}: {reply.status} {str(read)[:200]}")

    async def _page(self, generator: random.Random) -> None:
        async with self._http.get(f"{self._url}{generator.choice(_PAGES)}") as reply:
            await reply.read()
            if reply.status != 200:
                self.counts.fail("page", f"{reply.url.path}: {reply.status}")

    async def _feed(self, generator: random.Random) -> None:
        """Watch the feed for a while, as the dashboard does."""
        until = time.monotonic() + generator.random() * _FEED_S
        async with self._http.get(f"{self._url}/admin/v1/events") as reply:
            while time.monotonic() < until and await reply.content.read(1 << 16):
                pass
