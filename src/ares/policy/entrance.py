"""Entrance: who of those outside decode enters next, and where; and which running request gives its room up for it.

The rules of admission.py, queue.py and suspend.py in the order in which they are asked, as a live controller asks them:
one call for all who wait. The simulator asks the same rules inside its compiled event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ares.policy.admission import AdmissionSettings, admission_among, tokens_within
from ares.policy.cluster import BoolArray, Cluster, FloatArray, IntArray
from ares.policy.forecast import forecast, geometric_grid, own_curve, quantile_weights
from ares.policy.queue import memory_time
from ares.policy.suspend import SuspendSettings, final_slack_s

GRID = geometric_grid(16_000, 64)
"""Steps ahead at which it forecasts: a peak between two points is underestimated by a sixth at most."""
_NOBODY = -1


@dataclass(frozen=True, slots=True)
class Progress:
    """How requests stand against their objectives; all arrays have one element a request.

    Attributes
    ----------
    generated
        Output tokens so far.
    elapsed_s
        Seconds since the first token.
    late
        Whether the first token has missed its objective.
    ttft_s, tpot_s
        The objectives: time to first token, and seconds a token.
    """

    generated: IntArray
    elapsed_s: FloatArray
    late: BoolArray
    ttft_s: FloatArray
    tpot_s: FloatArray

    def spare(self, remaining: FloatArray, step_s: FloatArray | float) -> tuple[FloatArray, BoolArray]:
        """Return the seconds that requests may stand still, and which miss their objectives even without.

        Parameters
        ----------
        remaining
            Quantiles of what each will still generate, shape (R, Q).
        step_s
            Seconds a token takes, shape (R,) or one for all.
        """
        known = (self.tpot_s, self.generated, self.elapsed_s)
        least: FloatArray = final_slack_s(*known, remaining[:, 0], step_s)  # type: ignore[arg-type,assignment]
        most: FloatArray = final_slack_s(*known, remaining[:, -1], step_s)  # type: ignore[arg-type,assignment]
        return least, self.late | (most < 0.0)


@dataclass(frozen=True, slots=True)
class Candidates:
    """W requests outside decode: prefilled ones that are held, and suspended ones.

    Attributes
    ----------
    requests
        Identifiers, length W.
    tokens
        KV tokens that each brings along, shape (W,).
    remaining_tokens
        Quantiles of what each will still generate, at the cluster's levels, shape (W, Q).
    rank
        Class of each, shape (W,): a smaller one goes before every larger one.
    waited_s
        Seconds since it arrived, or was suspended, shape (W,).
    suspended
        Whether it has run before, shape (W,).
    progress
        How it stands against its objectives.
    barred
        Instances that each does not enter, shape (W, I): they have refused it, or would not restore its state. None:
        there are none.
    """

    requests: Sequence[str]
    tokens: IntArray
    remaining_tokens: FloatArray
    rank: IntArray
    waited_s: FloatArray
    suspended: BoolArray
    progress: Progress
    barred: BoolArray | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision: a candidate enters `instance`, or the running row `index` of the cluster is suspended there."""

    kind: Literal["enter", "resume", "suspend"]
    index: int
    instance: int
    reason: str


class Entrance:
    """Decides who enters. It keeps the credit of the oldest from one call to the next, and nothing else.

    Parameters
    ----------
    admission
        Knobs of admission and order.
    suspension
        Knobs of suspension; None: nobody is suspended.
    """

    def __init__(self, admission: AdmissionSettings, suspension: SuspendSettings | None) -> None:
        self.admission = admission
        self.suspension = suspension
        self.age_credit = 0.0

    def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> list[Entry]:
        """Return what to do now, in this order.

        Parameters
        ----------
        cluster
            The decode pool; requests that are on their way to an instance are rows there.
        candidates
            Who is outside.
        running
            How the rows of the cluster stand, R elements.
        """
        if not len(candidates.tokens) or not cluster.open.any():
            return []
        asked = _Round(cluster, candidates, running, self.admission, self.suspension, self.age_credit)
        entries = asked.decide()
        self.age_credit = asked.credit
        return entries


class _Round:
    """One call: the state of the forecast while requests enter it one by one."""

    def __init__(
        self,
        cluster: Cluster,
        candidates: Candidates,
        running: Progress,
        admission: AdmissionSettings,
        suspension: SuspendSettings | None,
        credit: float,
    ) -> None:
        self.cluster, self.candidates, self.running = cluster, candidates, running
        self.settings, self.credit = admission, credit
        self.entries: list[Entry] = []
        ahead = forecast(cluster, GRID)
        self.grid = ahead.grid.astype(np.float64)
        self.expected, self.variance = ahead.expected.copy(), ahead.variance.copy()
        self.weights = quantile_weights(cluster.levels)
        self.middle = len(cluster.levels) // 2
        known = cluster.step_base_s is not None
        # Without a step law nobody can say what a request has to spare.
        self.suspension = suspension if known else None
        tpot = candidates.progress.tpot_s
        budget = float(tpot.min()) * (1.0 - admission.tpot_margin) if self.suspension is not None else np.inf
        self.capacity = self._capacity(budget)
        self.step_s = self._full_step_s(budget)
        self.size = memory_time(candidates.tokens.astype(np.float64), candidates.remaining_tokens[:, self.middle])
        late = ~candidates.suspended & (candidates.waited_s > candidates.progress.ttft_s)
        # Whoever has missed its first token goes behind all who have not.
        self.late = late if self.suspension is not None else np.zeros_like(late)
        held = np.flatnonzero(~candidates.suspended)
        keys = (self.size[held], self.late[held], candidates.rank[held])
        self.order: list[int] = held[np.lexsort(keys)].tolist()
        self.by_age: list[int] = held[np.argsort(-candidates.waited_s[held], kind="stable")].tolist()
        self.suspended = set(np.flatnonzero(candidates.suspended).tolist())
        self.entered: set[int] = set()
        self.given_up: set[int] = set()
        self.slack, self.dead = self._slack(candidates.progress, candidates.remaining_tokens)

    def decide(self) -> list[Entry]:
        """Let requests in until the next one fits nowhere.

        In this order: suspended ones that must run again; the oldest, when its share of the admitted memory-time has
        grown to its size; the held, smallest memory-time first; suspended ones that can wait.
        """
        while True:
            resumable, spare = self._next_to_resume()
            if self._urgent(resumable, spare) and self._resume(resumable, urgent=True):
                continue
            held = next((c for c in self.order if c not in self.entered), _NOBODY)
            if held != _NOBODY and self._admit(held):
                continue
            if held != _NOBODY and self._is_barred(held):
                # Others may go where it may not.
                self.order.remove(held)
                continue
            if held != _NOBODY and not self.late[held]:
                break
            if resumable != _NOBODY and self._resume(resumable, urgent=False):
                continue
            break
        return self.entries

    # --- limits ---

    def _capacity(self, budget_s: float) -> IntArray:
        """Return the tokens that each instance can hold, and decode in the time that a step may take, shape (I,)."""
        cluster, capacity = self.cluster, self.cluster.capacity_tokens.copy()
        if not np.isfinite(budget_s):
            return capacity
        assert cluster.step_base_s is not None  # noqa: S101 - for the type checker: a budget means a law
        assert cluster.step_request_s is not None  # noqa: S101 - likewise
        assert cluster.step_token_s is not None  # noqa: S101 - likewise
        batch = np.bincount(cluster.location, minlength=len(capacity)) + 1
        for n in range(len(capacity)):
            law = (float(cluster.step_base_s[n]), float(cluster.step_request_s[n]), float(cluster.step_token_s[n]))
            tokens = tokens_within(budget_s, *law, int(batch[n]))
            if 0.0 < tokens < capacity[n]:  # none at all: the objective is out of reach, and memory decides
                capacity[n] = int(tokens)
        return capacity

    def _full_step_s(self, budget_s: float) -> float:
        """Return the seconds of a step with full memory, or what a step may take where that is less."""
        cluster = self.cluster
        if cluster.step_base_s is None or cluster.step_token_s is None:
            return np.inf
        full = float((cluster.step_base_s + cluster.step_token_s * cluster.capacity_tokens).mean())
        return min(full, budget_s)

    def _slack(self, progress: Progress, remaining: FloatArray | None) -> tuple[FloatArray, BoolArray]:
        """Return the seconds that requests may stand still, and which miss their objectives even without."""
        count = len(progress.generated)
        if self.suspension is None or remaining is None:
            return np.full(count, np.inf), np.zeros(count, np.bool_)
        return progress.spare(remaining, self.step_s)

    # --- entering ---

    def _open(self, candidate: int) -> BoolArray:
        """Return the instances that a candidate may enter, shape (I,)."""
        barred = self.candidates.barred
        return self.cluster.open if barred is None else self.cluster.open & ~barred[candidate]

    def _is_barred(self, candidate: int) -> bool:
        return self.candidates.barred is not None and bool(self.candidates.barred[candidate].any())

    def _fit(self, candidate: int, *, urgent: bool) -> tuple[int, FloatArray, FloatArray]:
        """Return where a candidate may enter, or -1, and its own curve.

        An urgent one needs room for its next steps only: it has time to be suspended again, and none to wait.
        """
        remaining = np.ascontiguousarray(self.candidates.remaining_tokens[candidate])
        mean, variance = np.zeros(len(self.grid)), np.zeros(len(self.grid))
        tokens = float(self.candidates.tokens[candidate])
        own_curve(tokens, remaining, self.weights, self.grid, mean, variance)
        horizon = float(remaining[-1])
        if urgent and self.suspension is not None:
            horizon = min(horizon, self.suspension.urgent_steps)
        points = max(1, int(np.searchsorted(self.grid, horizon, side="left")))
        chosen = admission_among(
            self.expected[:, :points],
            self.variance[:, :points],
            self.capacity,
            self._open(candidate),
            mean[:points],
            variance[:points],
            0.0 if urgent else self.settings.deviations,
            self.settings.headroom,
        )
        return chosen, mean, variance

    def _enter(self, candidate: int, instance: int, curve: tuple[FloatArray, FloatArray], why: str) -> None:
        tokens = int(self.candidates.tokens[candidate])
        self.expected[instance] += curve[0]
        self.variance[instance] += curve[1]
        self.entered.add(candidate)
        resumes = candidate in self.suspended
        self.suspended.discard(candidate)
        peak, limit = float(self.expected[instance].max()), int(self.capacity[instance])
        reason = f"{why}; {tokens} tokens, expected peak {peak:.0f} of {limit}"
        self.entries.append(Entry("resume" if resumes else "enter", candidate, instance, reason))

    def _admit(self, candidate: int) -> bool:
        """Let the oldest in, if it is its turn, or the candidate; return whether either fitted."""
        oldest = next(c for c in self.by_age if c not in self.entered)
        if self.credit >= self.size[oldest]:
            chosen, *curve = self._fit(oldest, urgent=False)
            if chosen >= 0:
                self.credit -= float(self.size[oldest])
                self._enter(oldest, chosen, (curve[0], curve[1]), "the oldest")
                return True
            # It goes on waiting for room; whoever is small enough to fit does not wait with it.
        chosen, *curve = self._fit(candidate, urgent=False)
        why = "fits"
        waited = float(self.candidates.waited_s[candidate])
        if (
            chosen < 0
            and self.suspension is not None
            and not self.late[candidate]
            and waited >= self.suspension.after_s
        ):
            need = float(curve[0].max())  # what it will hold at its peak
            chosen = self._make_room(need, candidate)
            why = "another gives way"
        if chosen < 0:
            return False
        self.credit += self.settings.age_share * float(self.size[candidate])
        self._enter(candidate, chosen, (curve[0], curve[1]), why)
        return True

    def _resume(self, candidate: int, *, urgent: bool) -> bool:
        chosen, *curve = self._fit(candidate, urgent=urgent)
        if chosen < 0:
            return False
        self._enter(candidate, chosen, (curve[0], curve[1]), "must run again" if urgent else "runs again")
        return True

    def _next_to_resume(self) -> tuple[int, float]:
        """Return the suspended candidate with the least to spare, the lost last, and its slack; -1 for none.

        One that has been suspended for too long has nothing to spare.
        """
        best, best_key, best_spare = _NOBODY, np.inf, 0.0
        longest = self.suspension.longest_s if self.suspension is not None else np.inf
        for candidate in sorted(self.suspended):
            waited = float(self.candidates.waited_s[candidate])
            spare = float(self.slack[candidate])
            key = 1e9 - waited if self.dead[candidate] else min(spare, 1e8)
            if waited > longest:
                spare = key = 0.0
            if key < best_key:
                best, best_key, best_spare = candidate, key, spare if key < 5e8 else np.inf
        return best, best_spare

    def _urgent(self, candidate: int, spare: float) -> bool:
        return candidate != _NOBODY and self.suspension is not None and spare < self.suspension.urgent_s

    # --- giving way ---

    def _make_room(self, tokens: float, candidate: int) -> int:
        """Suspend the running request that can spare it most for a candidate; return its instance, or -1."""
        cluster, settings = self.cluster, self.suspension
        if settings is None or cluster.remaining_tokens is None or not len(cluster.location):
            return -1
        resident = cluster.resident_tokens.astype(np.float64)
        slack, dead = self._slack(self.running, cluster.remaining_tokens)
        own = memory_time(resident, cluster.remaining_tokens[:, self.middle])
        able = cluster.movable & self._open(candidate)[cluster.location]
        free = cluster.capacity_tokens - self.expected[:, 0]
        able &= free[cluster.location] + resident >= tokens
        able &= own >= settings.ratio * float(self.size[candidate])
        able &= dead | (slack >= settings.least_slack_s)
        able[list(self.given_up)] = False
        if not able.any():
            return -1
        score = np.where(able, np.where(dead, 1e9 + own, slack), -np.inf)
        row = int(np.argmax(score))
        instance = int(cluster.location[row])
        self.given_up.add(row)
        spares = "misses its objective anyway" if dead[row] else f"can stand still for {slack[row]:.1f} s"
        reason = f"{spares}; {resident[row]:.0f} tokens make room for {self.candidates.requests[candidate]}"
        self.entries.append(Entry("suspend", row, instance, reason))
        self._forget(row, instance)
        return instance

    def _forget(self, row: int, instance: int) -> None:
        """Take a row out of the forecast."""
        assert self.cluster.remaining_tokens is not None  # noqa: S101 - for the type checker: asked before
        mean, variance = np.zeros(len(self.grid)), np.zeros(len(self.grid))
        remaining = np.nan_to_num(self.cluster.remaining_tokens[row], nan=np.inf)
        own_curve(float(self.cluster.resident_tokens[row]), remaining, self.weights, self.grid, mean, variance)
        self.expected[instance] = np.maximum(self.expected[instance] - mean, 0.0)
        self.variance[instance] = np.maximum(self.variance[instance] - variance, 0.0)
