"""A workload: when requests arrive and how long they are."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

NO_TEMPLATE = -1
"""What stands in `Workload.templates` where a prompt has no further beginning."""


@dataclass(frozen=True, slots=True)
class NamedBlocks:
    """The full blocks of R prompts, as a trace names them: equal numbers are equal blocks with equal beginnings.

    Attributes
    ----------
    tokens
        Tokens of a block.
    names
        The blocks of one prompt after the other, shape (B,).
    first
        Where those of each prompt begin, and the end of the last, shape (R + 1,).
    """

    tokens: int
    names: NDArray[np.int64]
    first: NDArray[np.int64]

    def repeated(self, rounds: int, count: int) -> "NamedBlocks":
        """Return those of the first `count` of the prompts repeated so often; a repetition shares none with another."""
        apart = int(self.names.max(initial=-1)) + 1
        names = np.concatenate([self.names + apart * number for number in range(rounds)])
        ends = np.concatenate([self.first[1:] + self.first[-1] * number for number in range(rounds)])[:count]
        return NamedBlocks(self.tokens, names[: ends[-1]], np.concatenate([[0], ends]))


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival; all arrays have shape (R,).

    Attributes
    ----------
    name
        Where the requests come from.
    arrival_s
        Arrival in seconds from the first request, never decreasing.
    prompt_tokens
        Prompt length, at least 1.
    output_tokens
        Output length, at least 1.
    templates
        What the prompts begin with, as numbers, the shortest beginning first and NO_TEMPLATE behind the last, shape
        (R, T); None where the trace does not show it.
    blocks
        The full blocks of the prompts; None where the trace does not name them, or they were not asked for.
    notes
        Notes for the user about how it was read from its file, a sentence each.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    notes: tuple[str, ...] = ()
    templates: NDArray[np.int64] | None = None
    blocks: NamedBlocks | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Requests per second over the span of the arrivals; infinite where all arrive at once."""
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span if span > 0 else float("inf")

    @property
    def memory_time(self) -> NDArray[np.float64]:
        """Token-steps of KV memory that each request occupies while it decodes: o (n + (o - 1) / 2), shape (R,)."""
        output = self.output_tokens.astype(np.float64)
        return output * (self.prompt_tokens + (output - 1.0) / 2.0)

    def at_rate(self, requests_per_s: float) -> "Workload":
        """Stretch or compress the arrivals to a mean rate; the pattern and the lengths stay."""
        if not np.isfinite(self.rate):
            return self
        factor = self.rate / requests_per_s
        return replace(self, arrival_s=self.arrival_s * factor, notes=())

    def repeated(self, count: int) -> "Workload":
        """Return `count` requests: this workload repeated as often as needed."""
        rounds = -(-count // len(self))
        period_s = float(self.arrival_s[-1]) + (1.0 / self.rate if np.isfinite(self.rate) else 0.0)
        arrival = np.concatenate([self.arrival_s + period_s * repetition for repetition in range(rounds)])[:count]
        prompt, output = (np.tile(x, rounds)[:count] for x in (self.prompt_tokens, self.output_tokens))
        templates = None if self.templates is None else np.tile(self.templates, (rounds, 1))[:count]
        blocks = None if self.blocks is None else self.blocks.repeated(rounds, count)
        return Workload(self.name, arrival, prompt, output, templates=templates, blocks=blocks)
