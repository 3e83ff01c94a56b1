"""One greedy output on chosen instances, with the time of each token: what every check of a transfer is made of."""

import asyncio
import itertools
import random
import time
from typing import Any

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta, EngineLostError
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.session.placement import Placement
from ares.gateway.session.session import Session

# Longest hand-over, as in a gateway's default settings.
HANDOVER_TIMEOUT_S = 10.0
_IDS_FROM = 3


class Chosen:
    """The instances of one output: where it is prefilled (None: where it decodes) and where it decodes."""

    def __init__(self, prefill: Instance | None, decode: Instance) -> None:
        self._prefill, self._decode = prefill, decode

    def choose_prefill(self, _: Placement, __: Instance | None) -> Instance | None:
        """Return the instance to prefill on."""
        return self._prefill

    def prefill_ended(self, _: Placement, __: Instance, ___: int | None) -> None:
        """Nothing is learned from it."""

    def decode_began(self, _: Placement, __: Instance) -> None:
        """Nothing is counted."""

    async def admit(self, _: Session, exclude: set[str]) -> Instance:
        """Return the instance to decode on; NoInstanceError where it did not take the output."""
        if self._decode.name in exclude or not self._decode.open:
            raise NoInstanceError(f"{self._decode.name} does not take the request")
        return self._decode


class Generation:
    """A greedy output of a fixed length that runs. Use it as a context manager: leaving it aborts what still runs.

    Parameters
    ----------
    prompt
        Token ids.
    count
        Output tokens to generate.
    decode, prefill
        Where.
    gateway
        Name of the gateway that instances know it by.

    Attributes
    ----------
    tokens, times
        The output so far, and when each token came (`time.monotonic`).
    """

    def __init__(
        self, prompt: list[int], count: int, decode: Instance, prefill: Instance | None = None, *, gateway: str
    ) -> None:
        self.prompt, self.count = prompt, count
        self.tokens: list[int] = []
        self.times: list[float] = []
        sampling = Sampling({"temperature": 0.0, "ignore_eos": True}, count)
        self.session = Session(
            "ares-check", prompt, sampling, Chosen(prefill, decode), HANDOVER_TIMEOUT_S, gateway=gateway
        )
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> "Generation":
        self._task = asyncio.create_task(self.session.run(self._emit))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _emit(self, batch: list[Delta]) -> bool:
        now = time.monotonic()
        for delta in batch:
            new = delta.token_ids or []
            self.tokens += new
            self.times += [now] * len(new)
        self._changed.set()
        return False

    async def reach(self, count: int) -> None:
        """Wait until it has this many tokens, and an instance runs it."""
        while len(self.tokens) < count or self.session.unmovable_now() == "not_decoding":
            if self._task.done():
                self._task.result()
                raise EngineLostError(f"the output ended after {len(self.tokens)} tokens")
            self._changed.clear()
            waiting = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait((waiting, self._task), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

    async def finish(self) -> list[int]:
        """Wait for the end, and return all tokens.

        Raises
        ------
        EngineLostError
            It has fewer tokens than it should, or an instance was lost on the way.
        NoInstanceError, EngineRefusedError
            As `Session.run`.
        """
        await self._task
        if self.session.losses:
            raise EngineLostError("an instance was lost on the way")
        if len(self.tokens) != self.count:
            raise EngineLostError(f"{len(self.tokens)} tokens came instead of {self.count}")
        return self.tokens

    def gaps(self) -> list[float]:
        """Return the seconds between its tokens, without the first two, which hold the prefill."""
        return [after - before for before, after in itertools.pairwise(self.times[2:])]


async def generate(prompt: list[int], count: int, decode: Instance, *, gateway: str) -> list[int]:
    """Return the output of one instance that computes everything itself."""
    async with Generation(prompt, count, decode, gateway=gateway) as running:
        return await running.finish()


def new_prompt(generator: random.Random, tokens: int, vocabulary: int) -> list[int]:
    """Return token ids that no prefix cache has seen."""
    return [generator.randrange(_IDS_FROM, vocabulary) for _ in range(tokens)]


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the position of the first token that differs; None where both are equal."""
    pairs: Any = itertools.zip_longest(one, other)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), None)
