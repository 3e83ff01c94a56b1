"""Sending each request of a table to both servers, and comparing what they reply."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ares_dev.differential import bodies, known, replies
from ares_dev.moves import keep_moving

_CONCURRENT = 4
# It changes the log probabilities of the other requests of a batch (vLLM 0.32, V1 runner).
_DISTURBING = "logprob_token_ids"


@dataclass(slots=True)
class Comparison:
    """What was found.

    Attributes
    ----------
    equal
        Names of requests with equal replies.
    known
        What differs in replies that are known to differ (`known.REASONS`), by name.
    different
        What differs in others, by name.
    moves
        Outcomes of moves during the gateway's replies.
    """

    equal: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    moves: Counter[str] = field(default_factory=Counter)

    @property
    def stale(self) -> list[str]:
        """Names of requests that always differ, for a reason, and whose replies are equal."""
        return sorted(set(self.equal) & known.REASONS.keys() - known.SOMETIMES)

    def figures(self) -> dict[str, Any]:
        """Return them for a JSON file."""
        listed = {name: {"reason": known.REASONS[name], "difference": what} for name, what in self.known.items()}
        counts = {"requests": len(self.equal) + len(self.known) + len(self.different), "equal": len(self.equal)}
        return {**counts, "known": listed, "different": self.different, "moves": dict(self.moves)}


async def compare_moved(
    http: aiohttp.ClientSession, gateway: str, model: str, requests: dict[str, bodies.Request]
) -> Comparison:
    """Compare the gateway's replies to requests that are moved again and again with those to requests that are not."""
    found, enough = Comparison(), asyncio.Event()
    before = {name: await replies.send(http, gateway, r, {"model": model, **b}) for name, (r, b) in requests.items()}
    mover = asyncio.create_task(keep_moving(http, gateway, found.moves, enough, between=2, pause_s=0))
    try:
        for name, (route, body) in requests.items():
            what = replies.difference(await replies.send(http, gateway, route, {"model": model, **body}), before[name])
            if what is None:
                found.equal.append(name)
            else:
                found.different[name] = what
    finally:
        enough.set()
        await mover
    return found


async def compare(
    http: aiohttp.ClientSession,
    gateway: str,
    instance: str,
    model: str,
    requests: dict[str, bodies.Request],
    *,
    moving: bool = False,
    done: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare the replies of a gateway with those of an instance's own API.

    Parameters
    ----------
    gateway, instance
        URLs.
    moving
        Whether every request is moved to another instance again and again while the gateway replies.
    done
        Called after each request.
    """
    found = Comparison()
    places = asyncio.Semaphore(_CONCURRENT)

    async def one(name: str) -> None:
        route, body = requests[name]
        body = {"model": model, **body}
        async with places:
            ours = await replies.send(http, gateway, route, body)
            theirs = await replies.send(http, instance, route, body)
        what = replies.difference(ours, theirs)
        if what is None:
            found.equal.append(name)
        else:
            (found.known if name in known.REASONS else found.different)[name] = what
        done()

    enough = asyncio.Event()
    mover = asyncio.create_task(keep_moving(http, gateway, found.moves, enough, between=2)) if moving else None
    try:
        alone = [name for name, (_, body) in requests.items() if _DISTURBING in body]
        await asyncio.gather(*(one(name) for name in requests if name not in alone))
        for name in alone:
            await one(name)
    finally:
        enough.set()
        if mover is not None:
            await mover
    return found
