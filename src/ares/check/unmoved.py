"""Each instance alone: the same output on every one of them, its tokens and its time a token."""

import random
import statistics
from dataclasses import dataclass

from ares.check.generation import Generation, first_difference, new_prompt
from ares.check.instances import Cluster, Found
from ares.check.rows import Outcome, Row, listed

GROUP = "each instance alone"
_PROMPT_TOKENS = 64
# An instance is slow where its time a token is more than this many times that of the others.
_SLOW = 2.0
# Differences below this are jitter.
_JITTER_S = 0.002


@dataclass(frozen=True, slots=True)
class Alone:
    """What an instance generates: its tokens, and the median time between two of them."""

    found: Found
    tokens: list[int]
    gap_s: float


async def generate(cluster: Cluster, found: Found, count: int, vocabulary: int, seed: str) -> Alone:
    """Generate the output that all instances are compared by."""
    generator = random.Random(seed)  # noqa: S311 - a workload, not a secret
    prompt = new_prompt(generator, min(_PROMPT_TOKENS, found.hello.max_model_len // 4), vocabulary)
    async with Generation(prompt, count, found.instance, gateway=cluster.gateway) as running:
        tokens = await running.finish()
    return Alone(found, tokens, statistics.median(running.gaps()))


def rows(alone: list[Alone], *, exact: bool) -> list[Row]:
    """Return whether all generate the same tokens, and how fast each decode instance is."""
    return [_tokens(alone, exact=exact), *_speed([each for each in alone if each.found.hello.role != "prefill"])]


def _tokens(alone: list[Alone], *, exact: bool) -> Row:
    check = "tokens without a transfer"
    if not alone:
        return Row(GROUP, check, Outcome.NOT_RUN, "no instance generates")
    first = alone[0]
    others = {each.found.name: first_difference(each.tokens, first.tokens) for each in alone[1:]}
    different = {name: at for name, at in others.items() if at is not None}
    figures = {"first_difference": different}
    if not different:
        return Row(GROUP, check, Outcome.PASS, f"equal on {len(alone)} instances, {len(first.tokens)} tokens")
    value = f"others than on {first.found.name}: {listed(f'{name} from token {at}' for name, at in different.items())}"
    if exact:
        advice = "compare the weights, the flags of vLLM and the hardware of these instances"
        return Row(GROUP, check, Outcome.FAIL, value, advice, figures)
    advice = "may be rounding: --dtype float32 (to check, not to serve) shows whether it is"
    return Row(GROUP, check, Outcome.WARN, value, advice, figures)


def _speed(alone: list[Alone]) -> list[Row]:
    if not alone:
        return []
    times = {each.found.name: each.gap_s for each in alone}
    value = ", ".join(f"{name} {1000 * gap:.1f} ms" for name, gap in times.items())
    figures = {"median_gap_ms": {name: round(1000 * gap, 3) for name, gap in times.items()}}
    slow = [name for name, gap in times.items() if _is_slow(gap, [g for n, g in times.items() if n != name])]
    if not slow:
        return [Row(GROUP, "time a token", Outcome.PASS, value, figures=figures)]
    advice = f"{listed(slow)}: look for other work on its GPU or cores, and at its clocks and flags"
    return [Row(GROUP, "time a token", Outcome.WARN, value, advice, figures)]


def _is_slow(gap: float, others: list[float]) -> bool:
    return bool(others) and gap > _SLOW * statistics.median(others) and gap - statistics.median(others) > _JITTER_S
