"""The load of a learning cluster: phases of real prompts, at Poisson arrivals."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ares.bench.live.load import Planned


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run with one kind of requests.

    Attributes
    ----------
    name
        As the result and the picture name it.
    texts
        What users say, in the order in which it is sent, again and again.
    seconds, rate
        Its length, and requests per second.
    temperature
        Of sampling: with 0 a prompt that comes again would have the same output.
    limit
        Most output tokens of a request.
    """

    name: str
    texts: Sequence[str] = field(repr=False)
    seconds: float
    rate: float
    temperature: float
    limit: int


def arrivals(phases: Sequence[Phase], seed: int) -> Iterator[tuple[Phase, Planned]]:
    """Yield the requests of all phases in the order of their times, which count from the start of the run."""
    generator = random.Random(seed)  # noqa: S311 - a workload, not a secret
    begins = 0.0
    for phase in phases:
        at, number = generator.expovariate(phase.rate), 0
        while at < phase.seconds:
            body = {
                "messages": [{"role": "user", "content": phase.texts[number % len(phase.texts)]}],
                "temperature": phase.temperature,
                "max_tokens": phase.limit,
            }
            yield phase, Planned(f"{phase.name}-{number}", begins + at, body)
            at, number = at + generator.expovariate(phase.rate), number + 1
        begins += phase.seconds
