"""The invariants of a run, checked on what its clients saw and on what is left at its end.

I1 every request ends: whole, left by its client, or with an error that says why. I2 one instance generates for a
request at a time. I3 each token comes once and in order, and the usage counts it once. I4 the tokens are those of an
undisturbed run. I5 nothing stays allocated or pinned, and every pin ended once. I7 the gateway keeps serving,
whatever fails. Checks are pure; each violation begins with the invariant's number. (I6, I8: decisions.py.)
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ares_dev.chaos.clients import RequestResult

# The message of the errors that chaos/gateway.py injects into the controller.
INJECTED = "raised by the chaos suite"
# Errors that a client may get.
_EXACT = "cannot be resumed exactly"
_OFTEN = ("times, the last time:", "instances in turn did not take the request")
# A request may still be generated at an instance that was given up, until that notices: no longer than this.
_OVERLAP_S = 6.0
# Longest answer of `/health`, on a machine that engines, gateway and clients share.
_HEALTH_S = 10.0
# File descriptors that an idle gateway may have more than before it served.
EXTRA_FILES = 32
_RESOURCES = ("running", "waiting", "loading", "pinned", "kv_blocks_used", "kv_blocks_pinned")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")


@dataclass(slots=True)
class RequestChecker:
    """Checks requests as they end, and counts them.

    Attributes
    ----------
    outcomes
        How many ended with which outcome; errors by the reason that allows them.
    tokens
        Tokens that came, right or wrong.
    refused
        Requests that were answered with an error instead of a reply.
    violations
        What is wrong, one sentence each.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    refused: int = 0
    violations: list[str] = field(default_factory=list)

    def check(self, seen: RequestResult, expected: list[int]) -> None:
        """Check one request against the tokens that it has in an undisturbed run."""
        self.tokens += len(seen.tokens)
        outcome: str = seen.outcome
        came = f"{seen.plan.name} ({seen.plan.client}, {len(seen.tokens)} of {len(expected)} tokens)"
        difference = _difference(seen.tokens, expected)
        if difference is not None:
            self.violations.append(f"I3, I4: {came}: {difference}")
        match seen.outcome:
            case "completed":
                if difference is None and len(seen.tokens) < len(expected):
                    self.violations.append(f"I3: {came}: it ended early")
                if seen.counted != len(seen.tokens):
                    self.violations.append(f"I3: {came}: the usage counts {seen.counted}")
            case "failed":
                self.refused += seen.status != 200
                reason = _allowed_reason(seen)
                outcome = f"failed: {reason or 'not allowed'}"
                if reason is None:
                    self.violations.append(f"I1: {came}: {seen.status} {seen.error}")
            case "broken" | "hung":
                self.violations.append(f"I1: {came}: {seen.outcome}, status {seen.status} {seen.error or ''}")
        self.outcomes[outcome] += 1


def _difference(tokens: list[int], expected: list[int]) -> str | None:
    """Return how tokens differ from the beginning of the expected ones; None where they do not."""
    at = next((n for n, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
    if at is None:
        return f"{len(tokens) - len(expected)} tokens too many" if len(tokens) > len(expected) else None
    differing = tokens[at : at + 8]
    # A mistake of a hand-over shows as a shift.
    for shift in range(1, 65):
        if differing == expected[at + shift : at + shift + len(differing)]:
            return f"{shift} lost before token {at}"
        if at >= shift and differing == expected[at - shift : at - shift + len(differing)]:
            return f"{shift} doubled at token {at}"
    return f"token {at} is {tokens[at]}, not {expected[at]}"


def _allowed_reason(seen: RequestResult) -> str | None:
    error = seen.error or ""
    if _EXACT in error and "seed" in seen.plan.parameters:
        return "not resumable"
    return "too many losses" if any(words in error for words in _OFTEN) else None


class OwnershipChecker:
    """Finds requests that two instances generate for."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._since: dict[tuple[str, frozenset[str]], float] = {}

    def check(self, now: float, generating: dict[str, list[str]]) -> None:
        """Take the keys that each answering instance generates for at a moment: `gateway/request/placement`."""
        where: dict[str, set[str]] = {}
        for instance, keys in generating.items():
            for key in keys:
                where.setdefault(key.rpartition("/")[0], set()).add(instance)
        double = {(request, frozenset(places)) for request, places in where.items() if len(places) > 1}
        self._since = {one: self._since.get(one, now) for one in double}
        for (request, places), since in list(self._since.items()):
            if now - since > _OVERLAP_S:
                self.violations.append(
                    f"I2: {request} is generated by {', '.join(sorted(places))} for {now - since:.1f} s"
                )
                self._since[request, places] = float("inf")


@dataclass(slots=True)
class FinalState:
    """What is left when all requests have ended.

    Attributes
    ----------
    counters
        Of each instance; a real one has fewer.
    silent
        Instances that reported none.
    malformed
        What instances reported that is impossible.
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
        Whether processes were killed or stopped: leases of what they were to pull may expire.
    died
        Processes that ended by themselves.
    """

    counters: list[dict[str, Any]]
    silent: list[str]
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


def check_final_state(final: FinalState, checker: RequestChecker) -> list[str]:
    """Return what is wrong at the end of a run."""
    return [*_engines(final), *_gateway(final, checker), *_service(final)]


def _engines(final: FinalState) -> Iterator[str]:
    for row in final.status.get("instances", ()):
        left = {name: row[name] for name in (*_RESOURCES, "sessions") if row.get(name)}
        if left:
            yield f"I5: {row['name']} still has {left}"
        if not row["healthy"] or row["draining"]:
            yield f"I7: {row['name']} is {'draining' if row['healthy'] else 'not healthy'} at the end"
    yield from (f"I5: {name} does not report its resources" for name in final.silent)
    yield from (f"I5: impossible: {what}" for what in final.malformed)
    for one in final.counters:
        left = {name: count for name, count in one.items() if count and (name in _RESOURCES or "." in name)}
        if left:
            yield f"I5: {one['name']} still has {left}"
        if "arrived" in one and one["arrived"] != one["finished"] + one["aborted"]:
            yield f"I1: {one['name']}: {one['arrived']} arrived, {one['finished']} finished, {one['aborted']} aborted"
        if "pins_made" in one:
            ended = one["pins_pulled"] + one["pins_released"] + one["pins_expired"]
            if one["pins_made"] != ended:
                yield f"I5: {one['name']}: {one['pins_made']} pins made, {ended} ended"
        if one["pins_expired"] and not final.disturbed:
            yield f"I5: {one['name']}: {one['pins_expired']} leases expired, and no process had died"
        # A process that was paused may continue with a pull for a request that was given up meanwhile.
        if one.get("pins_pulled_late") and not final.disturbed:
            yield f"I5: {one['name']}: {one['pins_pulled_late']} pins were pulled after they had ended"


def _gateway(final: FinalState, checker: RequestChecker) -> Iterator[str]:
    if final.status.get("requests"):
        yield f"I1: the gateway still has {len(final.status['requests'])} requests"
    for name in ("ares_active_requests", "ares_waiting_requests", "ares_suspended_requests"):
        if final.metrics.get(name):
            yield f"I1: {name} is {final.metrics[name]:g} at the end"
    # Where a client left, the gateway may have seen the request end first, or never begin.
    left = checker.outcomes["left"]
    failed = sum(count for outcome, count in checker.outcomes.items() if outcome.startswith("failed"))
    for outcome, least, most in (
        ("completed", checker.outcomes["completed"], checker.outcomes["completed"] + left),
        ("failed", failed - checker.refused, failed + left),
    ):
        if not least <= final.requests[outcome] <= most:
            yield f"I1: the gateway counts {final.requests[outcome]} {outcome}, its clients {least} to {most}"
    total = sum(final.requests.values())
    if not final.sent - left - checker.refused <= total <= final.sent:
        yield f"I1: {final.sent} requests were sent, {left} left, and the gateway counts {total}"
    before, after = final.files
    if after > before + EXTRA_FILES:
        yield f"I5: the gateway has {after} open files, and had {before}"


def _service(final: FinalState) -> Iterator[str]:
    yield from (f"I7: {name} ended by itself" for name in final.died)
    yield from (f"I7: /health: {failure}" for failure in final.health_failures)
    if final.health_s and max(final.health_s) > _HEALTH_S:
        yield f"I7: /health took {max(final.health_s):.1f} s"
    for name, text in final.logs.items():
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
