"""What must hold, whatever happened: the invariants of a run, from what its clients saw and what was left at its end.

I1 every request ends: whole, left by its client, or with an error that says why. I2 one instance generates for a
request at a time. I3 each token comes once and in order, and the usage counts it once. I4 the tokens are those of an
undisturbed run. I5 nothing stays allocated or pinned, and every pin ended once. I7 the gateway goes on serving,
whatever throws or lies. Checks are pure; what they say begins with the invariant's number. (I6, I8: decisions.py.)
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ares_dev.chaos.clients import Seen

# What the controller throws in dev/chaos/gateway.py.
INJECTED = "thrown by the chaos suite"
# Errors that a client may get, and what they are counted as.
_EXACT = "cannot be resumed exactly"
_OFTEN = ("times, the last time:", "instances in turn did not take it")
# A request may be generating where it was, unheard, until its instance notices: no longer than this.
_DOUBLE_S = 6.0
# Longest answer of `/health`, on a machine that engines, gateway and clients share.
_HEALTH_S = 10.0
# File descriptors that a gateway may have more at rest than before it served.
SPARE_FILES = 32
_HELD = ("running", "waiting", "loading", "pinned", "kv_blocks_used", "kv_blocks_pinned")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")


@dataclass(slots=True)
class Judge:
    """Judges requests as they end, and keeps the count.

    Attributes
    ----------
    endings
        How many ended in which way; errors by their excuse.
    tokens
        Tokens that came, right or wrong.
    refused
        Requests that were answered with an error instead of a reply.
    violations
        What is wrong.
    """

    endings: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    refused: int = 0
    violations: list[str] = field(default_factory=list)

    def take(self, seen: Seen, expected: list[int]) -> None:
        """Judge one request by the tokens that it has in an undisturbed run."""
        self.tokens += len(seen.tokens)
        ending: str = seen.ending
        came = f"{seen.ask.name} ({seen.ask.client}, {len(seen.tokens)} of {len(expected)} tokens)"
        difference = _difference(seen.tokens, expected)
        if difference is not None:
            self.violations.append(f"I3, I4: {came}: {difference}")
        match seen.ending:
            case "completed":
                if difference is None and len(seen.tokens) < len(expected):
                    self.violations.append(f"I3: {came}: it ended early")
                if seen.counted != len(seen.tokens):
                    self.violations.append(f"I3: {came}: the usage counts {seen.counted}")
            case "failed":
                self.refused += seen.status != 200
                excuse = _excuse(seen)
                ending = f"failed: {excuse or 'without an excuse'}"
                if excuse is None:
                    self.violations.append(f"I1: {came}: {seen.status} {seen.error}")
            case "broken" | "hung":
                self.violations.append(f"I1: {came}: {seen.ending}, status {seen.status} {seen.error or ''}")
        self.endings[ending] += 1


def _difference(tokens: list[int], expected: list[int]) -> str | None:
    """Say how tokens are not the beginning of the expected ones."""
    at = next((n for n, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
    if at is None:
        return f"{len(tokens) - len(expected)} tokens too many" if len(tokens) > len(expected) else None
    rest = tokens[at : at + 8]
    # What a hand-over could do wrong shows as a shift.
    for shift in range(1, 65):
        if rest == expected[at + shift : at + shift + len(rest)]:
            return f"{shift} lost before token {at}"
        if at >= shift and rest == expected[at - shift : at - shift + len(rest)]:
            return f"{shift} doubled at token {at}"
    return f"token {at} is {tokens[at]}, not {expected[at]}"


def _excuse(seen: Seen) -> str | None:
    error = seen.error or ""
    if _EXACT in error and "seed" in seen.ask.parameters:
        return "not resumable"
    return "too many losses" if any(words in error for words in _OFTEN) else None


class Owners:
    """Notices a request that two instances generate for."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._since: dict[tuple[str, frozenset[str]], float] = {}

    def look(self, now: float, generating: dict[str, list[str]]) -> None:
        """Take what each instance that answers generates at a moment: keys, `gateway/request/number of its place`."""
        where: dict[str, set[str]] = {}
        for instance, keys in generating.items():
            for key in keys:
                where.setdefault(key.rpartition("/")[0], set()).add(instance)
        double = {(request, frozenset(places)) for request, places in where.items() if len(places) > 1}
        self._since = {one: self._since.get(one, now) for one in double}
        for (request, places), since in list(self._since.items()):
            if now - since > _DOUBLE_S:
                self.violations.append(
                    f"I2: {request} is generated by {', '.join(sorted(places))} for {now - since:.1f} s"
                )
                self._since[request, places] = float("inf")


@dataclass(slots=True)
class Rest:
    """What was left when all had ended.

    Attributes
    ----------
    counters
        Of each instance; a real one tells less.
    unheard
        Instances that told none.
    malformed
        What instances told that cannot be.
    status
        The gateway's.
    metrics
        The gateway's, by name and labels; `requests` by outcome.
    health_s, health_failures
        How long `/health` took, each time; when it did not answer.
    files
        The gateway's open files, before and after.
    logs
        The logs that must hold no traceback, by name.
    sent
        Requests that clients sent.
    disturbed
        Whether processes were killed or stood still: leases of what they wanted may end.
    died
        Processes that ended by themselves.
    """

    counters: list[dict[str, Any]]
    unheard: list[str]
    malformed: list[str]
    status: dict[str, Any]
    metrics: dict[str, float]
    requests: Counter[str]
    health_s: list[float]
    health_failures: list[str]
    files: tuple[int, int]
    logs: dict[str, str]
    sent: int
    disturbed: bool
    died: list[str]


def at_rest(rest: Rest, judge: Judge) -> list[str]:
    """Return what is wrong at the end of a run."""
    return [*_engines(rest), *_gateway(rest, judge), *_service(rest)]


def _engines(rest: Rest) -> Iterator[str]:
    for row in rest.status.get("instances", ()):
        left = {name: row[name] for name in (*_HELD, "sessions") if row.get(name)}
        if left:
            yield f"I5: {row['name']} still has {left}"
        if not row["healthy"] or row["draining"]:
            yield f"I7: {row['name']} is {'draining' if row['healthy'] else 'not heard of'} at the end"
    yield from (f"I5: {name} does not tell what it holds" for name in rest.unheard)
    yield from (f"I5: what cannot be: {what}" for what in rest.malformed)
    for one in rest.counters:
        left = {name: count for name, count in one.items() if count and (name in _HELD or "." in name)}
        if left:
            yield f"I5: {one['name']} still has {left}"
        if "arrived" in one and one["arrived"] != one["finished"] + one["aborted"]:
            yield f"I1: {one['name']}: {one['arrived']} arrived, {one['finished']} finished, {one['aborted']} aborted"
        if "pins_made" in one:
            ended = one["pins_pulled"] + one["pins_released"] + one["pins_expired"]
            if one["pins_made"] != ended:
                yield f"I5: {one['name']}: {one['pins_made']} pins made, {ended} ended"
        if one["pins_expired"] and not rest.disturbed:
            yield f"I5: {one['name']}: {one['pins_expired']} leases ended, and nobody had died"
        # Where somebody stood still, it may wake up to pull for a request that was given up meanwhile.
        if one.get("pins_pulled_late") and not rest.disturbed:
            yield f"I5: {one['name']}: {one['pins_pulled_late']} pins were pulled after they had ended"


def _gateway(rest: Rest, judge: Judge) -> Iterator[str]:
    if rest.status.get("requests"):
        yield f"I1: the gateway still has {len(rest.status['requests'])} requests"
    for name in ("ares_active_requests", "ares_waiting_requests", "ares_suspended_requests"):
        if rest.metrics.get(name):
            yield f"I1: {name} is {rest.metrics[name]:g} at rest"
    # Of whoever left, the gateway may have seen the request end first, or never begin.
    left = judge.endings["left"]
    failed = sum(count for ending, count in judge.endings.items() if ending.startswith("failed"))
    for outcome, least, most in (
        ("completed", judge.endings["completed"], judge.endings["completed"] + left),
        ("failed", failed - judge.refused, failed + left),
    ):
        if not least <= rest.requests[outcome] <= most:
            yield f"I1: the gateway counts {rest.requests[outcome]} {outcome}, its clients {least} to {most}"
    total = sum(rest.requests.values())
    if not rest.sent - left - judge.refused <= total <= rest.sent:
        yield f"I1: {rest.sent} requests were sent, {left} left, and the gateway counts {total}"
    before, after = rest.files
    if after > before + SPARE_FILES:
        yield f"I5: the gateway has {after} open files, and had {before}"


def _service(rest: Rest) -> Iterator[str]:
    yield from (f"I7: {name} ended by itself" for name in rest.died)
    yield from (f"I7: /health: {failure}" for failure in rest.health_failures)
    if rest.health_s and max(rest.health_s) > _HEALTH_S:
        yield f"I7: /health took {max(rest.health_s):.1f} s"
    for name, text in rest.logs.items():
        for last in tracebacks(text):
            if INJECTED not in last:
                yield f"I7: {name}.log: {last}"


def tracebacks(log: str) -> list[str]:
    """Return the last line of every traceback in a log; of a chain of exceptions, that of the one that came out."""
    found: list[str] = []
    chained = False
    lines = iter(log.splitlines())
    for line in lines:
        if _TRACEBACK in line:
            prefix = re.escape(line.partition(_TRACEBACK)[0].strip(" +|"))
            # What follows is indented, to the line that names the exception; worker processes prefix theirs.
            last = next((last for last in lines if re.match(rf"{prefix} ?[^\s|+]", last)), "cut off")
            found[len(found) - chained :] = [last]
            chained = False
        elif any(words in line for words in _CHAINED):
            chained = bool(found)
        elif line.strip():
            chained = False
    return found
