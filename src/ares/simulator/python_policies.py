"""Policies that are not compiled into the event loop: it stops, calls them in Python, and continues."""

from dataclasses import replace

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
from ares.policy.admission.state import ADMIT, RESUME, SUSPEND, WAITING
from ares.policy.cluster import IntArray
from ares.policy.dispatch.base import CALL_CHOOSE
from ares.simulator.admission import carry_out_decision
from ares.simulator.block_cache import cached_tokens
from ares.simulator.decisions import enqueue, used_tokens
from ares.simulator.loop import handle_events
from ares.simulator.prefill_policies import PrefillChoice
from ares.simulator.state import (
    BY_PYTHON_POLICY,
    FINISHED,
)
from ares.simulator.telemetry import Telemetry

_KINDS = {"admit": ADMIT, "resume": RESUME, "suspend": SUSPEND}


class PythonPolicies:
    """Runs the event loop, and calls the dispatch or admission policy of a preset that the loop has not compiled in.

    A policy that fails, or makes an invalid decision, ends the run with a DecisionError.
    """

    def __init__(self, preset: Preset, telemetry: Telemetry) -> None:
        self._telemetry, self._state = telemetry, telemetry.state
        self._dispatch: Dispatch | None = None
        self._admission: Admission | None = None
        if self._state.parameters.admission_mode == BY_PYTHON_POLICY:
            self._admission = admission_policy(preset.admission, preset.admission_settings)
        elif not preset.queues_requests and self._state.parameters.dispatch_rule == CALL_CHOOSE:
            self._dispatch = dispatcher(preset.dispatch, preset.dispatch_settings)
        self._prefills = PrefillChoice(preset, self._state) if self._state.parameters.calls_prefill_policy else None
        self._ended = np.zeros(len(self._state.arrival), np.bool_)
        self._reported = 0

    def run_until(self, moment: float) -> bool:
        """Handle every event up to `moment`, calling the policy in between; return whether any event is left."""
        state = self._state
        while True:
            more = handle_events(state, moment)
            moment_of_call = float(state.current.call_policy_at_s)
            if not moment_of_call <= moment:
                return more
            state.current.call_policy_at_s = np.inf
            if self._prefills is not None:
                self._prefills.place_waiting(moment_of_call)
            if self._dispatch is not None:
                self._dispatch_requests(self._dispatch, moment_of_call)
            elif self._admission is not None:
                self._admit(self._admission, moment_of_call)

    def decide_periodically(self, moment: float) -> None:
        """Call the admission policy where requests are outside decode, or where it always wants to be called."""
        policy, current = self._admission, self._state.current
        if policy is not None and (policy.watches or current.queue_size + current.suspended_count > 0):
            self._admit(policy, moment)

    # --- dispatch ---

    def _dispatch_requests(self, policy: Dispatch, moment: float) -> None:
        """Call the policy for each request that waits for dispatch, in order."""
        state = self._state
        count = int(state.current.queue_size)
        state.current.queue_size = 0
        for request in state.order[:count].tolist():
            cluster = self._telemetry.cluster(moment) if policy.sees_requests else self._loads(moment)
            if policy.sees_prefixes(policy.settings):
                cached = [cached_tokens(state, instance, request) for instance in range(len(state.time))]
                cluster = replace(cluster, cached_tokens=np.array(cached, np.int64))
            remaining = state.observed_remaining[request].copy() if self._telemetry.predicts else None
            chosen = choose_instance(policy, cluster, int(state.prompt[request] + state.generated[request]), remaining)
            if chosen is None:
                raise RuntimeError(f"no decode instance is open at {moment:g} s")
            enqueue(state, request, chosen, moment)

    def _loads(self, moment: float) -> Cluster:
        """Return the decode pool without its requests, as the gateway gives it."""
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

    def _admit(self, policy: Admission, moment: float) -> None:
        cluster = self._telemetry.cluster(moment)
        running = self._telemetry.progress(len(cluster.location), moment)
        outside = self._outside()
        rows = self._telemetry.requests[: len(cluster.location)].copy()
        candidates = self._candidates(outside, moment)
        for decision in decide_admissions(policy, cluster, candidates, running, self._newly_ended()):
            carry_out_decision(self._state, *_numbers(decision, rows, outside), moment)

    def _outside(self) -> IntArray:
        """Return the requests outside decode: the waiting by arrival, then the suspended."""
        state, current = self._state, self._state.current
        arrived = state.by_age[current.by_age_start : current.by_age_end]
        waiting = arrived[state.status[arrived] == WAITING]
        return np.concatenate([waiting, state.suspended_list[: current.suspended_count]])

    def _candidates(self, outside: IntArray, moment: float) -> Candidates:
        state = self._state
        return Candidates(
            requests=outside,  # type: ignore[arg-type] # identifiers are numbers here
            tokens=state.observed_tokens[outside],
            remaining_tokens=state.observed_remaining[outside],
            rank=state.rank[outside],
            waited_s=moment - state.waiting_since[outside],
            suspended=state.status[outside] != WAITING,
            progress=self._telemetry.progress_of(outside, moment),
        )

    def _newly_ended(self) -> list[int]:
        """Return the lengths of the outputs that have ended since the last call, in that order."""
        state = self._state
        if state.current.finished == self._reported:
            return []
        self._reported = int(state.current.finished)
        new = np.flatnonzero((state.status == FINISHED) & ~self._ended)
        self._ended[new] = True
        lengths: list[int] = state.output[new[np.argsort(state.finish[new], kind="stable")]].tolist()
        return lengths


def _numbers(decision: AdmissionDecision, rows: IntArray, outside: IntArray) -> tuple[int, int, int]:
    """Return the kind, the request and the instance of a decision."""
    index = int(decision.index)
    request = rows[index] if decision.kind == "suspend" else outside[index]
    return _KINDS[decision.kind], int(request), int(decision.instance)
