"""Policies that the event loop does not have built in: it stops to ask one, and goes on with the answer."""

import numpy as np

from ares.policy import (
    Admission,
    Cluster,
    Dispatch,
    Preset,
    admission_policy,
    choose_instance,
    decide_admissions,
    dispatcher,
)
from ares.policy.admission import AdmissionDecision, Candidates
from ares.policy.admission.state import ADMIT, RESUME, SUSPEND
from ares.policy.admission.state import WAITING as OUTSIDE_WAITING
from ares.policy.cluster import IntArray
from ares.policy.dispatch.base import ASK
from ares.simulator.admission import carry_out_asked
from ares.simulator.decisions import enter, used_tokens
from ares.simulator.loop import run_until
from ares.simulator.state import (
    AGE_HEAD,
    AGE_TAIL,
    ASK_AT,
    BY_ASKING,
    DISPATCH_RULE,
    FINISHED,
    FINISHED_COUNT,
    HOLD,
    QUEUE_SIZE,
    SUSPENDED_COUNT,
)
from ares.simulator.telemetry import Telemetry

_KINDS = {"enter": ADMIT, "resume": RESUME, "suspend": SUSPEND}


class Asking:
    """Asks the dispatch or the admission of a preset, where its class names no rule that the event loop has.

    A policy that fails, or decides what cannot be, ends the run with a DecisionError.
    """

    def __init__(self, preset: Preset, telemetry: Telemetry) -> None:
        self._telemetry, self._state = telemetry, telemetry.state
        self._dispatch: Dispatch | None = None
        self._admission: Admission | None = None
        if self._state.scalars[HOLD] == BY_ASKING:
            self._admission = admission_policy(preset.admission, preset.admission_settings)
        elif not preset.holds and self._state.scalars[DISPATCH_RULE] == ASK:
            self._dispatch = dispatcher(preset.dispatch, preset.dispatch_settings)
        self._ended = np.zeros(len(self._state.arrival), np.bool_)
        self._learned = 0

    def run_until(self, moment: float) -> bool:
        """Handle every event up to `moment`; return whether any event is left after it."""
        state = self._state
        while True:
            more = run_until(state, moment)
            asked = float(state.scalars[ASK_AT])
            if not asked <= moment:
                return more
            state.scalars[ASK_AT] = np.inf
            if self._dispatch is not None:
                self._place(self._dispatch, asked)
            elif self._admission is not None:
                self._decide(self._admission, asked)

    def look(self, moment: float) -> None:
        """Ask an admission policy now and then: where somebody is outside, and one that watches in any case."""
        policy, counters = self._admission, self._state.counters
        if policy is not None and (policy.watches or counters[QUEUE_SIZE] + counters[SUSPENDED_COUNT] > 0):
            self._decide(policy, moment)

    # --- dispatch ---

    def _place(self, policy: Dispatch, moment: float) -> None:
        """Let the policy choose for each request that waits for a choice, in order."""
        state = self._state
        count = int(state.counters[QUEUE_SIZE])
        state.counters[QUEUE_SIZE] = 0
        for request in state.order[:count].tolist():
            cluster = self._telemetry.view(moment) if policy.sees_requests else self._loads(moment)
            remaining = state.seen_remaining[request].copy() if self._telemetry.predicts else None
            chosen = choose_instance(policy, cluster, int(state.prompt[request] + state.generated[request]), remaining)
            if chosen is None:
                raise RuntimeError(f"no decode instance is open at {moment:g} s")
            enter(state, request, chosen, moment)

    def _loads(self, moment: float) -> Cluster:
        """Return the decode pool without its requests, as the gateway shows it."""
        state, none = self._state, np.zeros(0, np.int64)
        loads = [used_tokens(state, instance, moment) for instance in range(len(state.time))]
        return Cluster(
            instances=self._telemetry.names,
            capacity_tokens=self._telemetry.capacity,
            promised_tokens=np.array(loads, np.int64),
            open=state.closed == 0,
            requests=none,
            location=none,
            resident_tokens=none,
            movable=none.astype(np.bool_),
        )

    # --- admission ---

    def _decide(self, policy: Admission, moment: float) -> None:
        cluster = self._telemetry.view(moment)
        running = self._telemetry.progress(len(cluster.location), moment)
        outside = self._outside()
        rows = self._telemetry.requests[: len(cluster.location)].copy()
        candidates = self._candidates(outside, moment)
        for entry in decide_admissions(policy, cluster, candidates, running, self._newly_ended()):
            carry_out_asked(self._state, *_numbers(entry, rows, outside), moment)

    def _outside(self) -> IntArray:
        """Return who is outside: the waiting in the order in which they came, then the suspended."""
        state, counters = self._state, self._state.counters
        came = state.by_age[counters[AGE_HEAD] : counters[AGE_TAIL]]
        waiting = came[state.outside[came] == OUTSIDE_WAITING]
        return np.concatenate([waiting, state.suspended_list[: counters[SUSPENDED_COUNT]]])

    def _candidates(self, outside: IntArray, moment: float) -> Candidates:
        state = self._state
        return Candidates(
            requests=outside,  # type: ignore[arg-type] # identifiers are numbers here
            tokens=state.seen_tokens[outside],
            remaining_tokens=state.seen_remaining[outside],
            rank=state.rank[outside],
            waited_s=moment - state.waits_since[outside],
            suspended=state.outside[outside] != OUTSIDE_WAITING,
            progress=self._telemetry.progress_of(outside, moment),
        )

    def _newly_ended(self) -> list[int]:
        """Return the lengths of the outputs that have ended since the last call, in that order."""
        state = self._state
        if state.counters[FINISHED_COUNT] == self._learned:
            return []
        self._learned = int(state.counters[FINISHED_COUNT])
        new = np.flatnonzero((state.status == FINISHED) & ~self._ended)
        self._ended[new] = True
        lengths: list[int] = state.output[new[np.argsort(state.finish[new], kind="stable")]].tolist()
        return lengths


def _numbers(entry: AdmissionDecision, rows: IntArray, outside: IntArray) -> tuple[int, int, int]:
    """Return the kind, the request and the instance of an entry."""
    index = int(entry.index)
    request = rows[index] if entry.kind == "suspend" else outside[index]
    return _KINDS[entry.kind], int(request), int(entry.instance)
