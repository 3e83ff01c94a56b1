"""A simulated cluster under one preset: build the state, call the policy every period, collect the outcome."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ares.policy import ADMISSIONS, DISPATCHERS, Preset, decide_moves, rebalancer
from ares.policy.admission import PREFILLED_KV_KEPT_S
from ares.policy.dispatch.base import CALL_CHOOSE
from ares.policy.length_curves import ALL, Lengths
from ares.policy.oom_avoidance import OomAvoidanceSettings, avoid_oom, exclude_conflicts
from ares.policy.roles import Roles
from ares.simulator.admission import free_expired_kv, refresh_and_admit, suspend_preempted
from ares.simulator.classes import SimulatedClass, apply, assign, names
from ares.simulator.decisions import kv_shares
from ares.simulator.error_models import ERROR_MODELS, ErrorModel
from ares.simulator.failures import fail_instance
from ares.simulator.length_cells import cells_of
from ares.simulator.moves import MoveRecord, carry_out
from ares.simulator.prediction import add_length, remember
from ares.simulator.profile import Profile, ProfileError
from ares.simulator.python_policies import PythonPolicies
from ares.simulator.roles import RoleRecord, SimulatedRoles
from ares.simulator.state import BY_COMPILED_LOOP, BY_PYTHON_POLICY, IMMEDIATE, PARAMETERS, State, allocate
from ares.simulator.telemetry import Telemetry
from ares.traces import Workload

_SAMPLES = 1500  # of KV use over a run, at most: enough for a heat map


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run; arrays over requests have shape (R,)."""

    preset: str
    workload: Workload
    first_token_s: NDArray[np.float64]
    classes: Sequence[str]
    """Names of the classes of service, `default` first."""
    class_of: NDArray[np.int64]
    """Index of each request's class."""
    longest_gap_s: NDArray[np.float64]
    """Longest interruption of each stream: preempted, suspended, moved, or because its instance was lost."""
    finish_s: NDArray[np.float64]
    preempted: NDArray[np.int64]
    moved: NDArray[np.int64]
    preemptions: int
    oom_events: int
    migrations: int
    suspensions: int
    migrated_bytes: int
    sample_s: NDArray[np.float64]
    kv_use: NDArray[np.float64]
    """Share of KV in use at each sample, shape (T, D)."""
    queued: NDArray[np.int64]
    """Requests that wait for admission at each sample, shape (T,)."""
    moves: list[MoveRecord]
    events: int
    simulated_s: float
    wall_s: float
    decision_s: NDArray[np.float64]
    """Wall time of each call of the rebalancer."""
    state: State
    role_changes: list[RoleRecord] = field(default_factory=list)


@dataclass(slots=True)
class Simulation:
    """One run, ready to start.

    Attributes
    ----------
    workload
        The requests that arrive.
    decode, prefill
        A profile for each instance; without prefill instances the decode instances prefill for themselves.
    preset, preset_name
        The policy.
    error
        The predictor.
    period_s
        Seconds between two calls of the rebalancer.
    seed
        Of the predictor's errors.
    ttft_s, tpot_s
        Objectives that requests are to meet, seconds.
    gap_s
        Objective for the longest gap of a stream; infinite: only the other objectives bound it.
    classes
        Classes of service by name; requests of none have the objectives of the preset, and `gap_s`.
    failures
        (time, instance): the instance is lost, and its requests resume elsewhere from their tokens.
    first_at_prefill
        The client gets the first token from prefill, when the request is admitted to decode, as from ARES's gateway;
        otherwise all tokens come from decode, as behind most routers.
    limit_tokens
        The limit that every request has for its output, and no prediction exceeds; by default the longest output.
    ended_before
        Lengths of the outputs that had ended when the run began, the newest last: what residual life starts from.
    roles, decoding
        Plans which instances prefill and which decode; `decode` and `prefill` are then the same instances, of which so
        many decode at first. None: roles do not change.
    prefix_caching
        Instances keep the blocks of prompts, which the workload must name.
    """

    workload: Workload
    decode: Sequence[Profile]
    prefill: Sequence[Profile]
    preset: Preset
    preset_name: str = "preset"
    error: ErrorModel = field(default_factory=lambda: ERROR_MODELS["continuous"])
    period_s: float = 0.5
    seed: int = 0
    failures: Sequence[tuple[float, int]] = ()
    ttft_s: float = 20.0
    tpot_s: float = 0.03
    gap_s: float = math.inf
    classes: Mapping[str, SimulatedClass] = field(default_factory=dict)
    first_at_prefill: bool = False
    limit_tokens: int | None = None
    ended_before: Sequence[int] = ()
    roles: Roles | None = None
    decoding: int = 0
    prefix_caching: bool = False

    def build(self) -> State:
        """Make the state at time zero; ProfileError or ValueError where the inputs cannot work."""
        work, first = self.workload, self.decode[0]
        for other in (*self.decode, *self.prefill):
            if (other.block_size, other.kv_bytes_per_token) != (first.block_size, first.kv_bytes_per_token):
                raise ProfileError(f"profile {other.name}: block_size and kv_bytes_per_token must equal {first.name}'s")
        smallest = min(profile.kv_tokens // profile.block_size * profile.block_size for profile in self.decode)
        longest = int((work.prompt_tokens + work.output_tokens).max())
        if longest > smallest:
            raise ProfileError(f"kv_tokens: an instance holds {smallest} tokens, one request needs {longest}")
        from_prefill = int(self.first_at_prefill and bool(self.prefill))
        room = min((p.kv_tokens // first.block_size * first.block_size for p in self.prefill), default=0)
        if self.prefill and int(work.prompt_tokens.max()) + from_prefill > room:
            raise ProfileError(f"kv_tokens: a prefill instance is smaller than a prompt of {work.prompt_tokens.max()}")
        slots = max(profile.max_num_seqs for profile in self.decode)
        exact = self.preset.knows_lengths
        predicts = (self.error.predicts or exact) and self.preset.predicts
        estimates = self.error.residual_life and predicts and not exact
        known = cells_of(work) if estimates and self.error.by_cells else None
        length_cells = (0, 0, 0) if known is None else (known.cells, *known.of_chain.shape)
        admission = ADMISSIONS[self.preset.admission]
        loop = admission.loop_settings(self.preset.admission_settings)
        state = allocate(
            len(work),
            len(self.decode),
            len(self.prefill),
            slots,
            first.block_size,
            length_cells=length_cells,
            cached_blocks=self._cached_blocks(),
            weighs_cached=self.prefix_caching and loop is not None and loop.cached_weight > 0.0,
        )
        named = work.blocks if self.prefix_caching else None
        if named is not None:
            state.block_names[:], state.first_block[:] = named.names, named.first
        if known is not None:
            state.chain_cells[:], state.length_chain[:] = known.of_chain, known.chain
        state.arrival[:] = work.arrival_s + first.start_delay_s
        # A first token from prefill is one that decode reads, not one that it generates.
        state.prompt[:] = work.prompt_tokens + from_prefill
        state.output[:] = np.maximum(work.output_tokens - from_prefill, 1)
        for count, tokens in enumerate(self.ended_before):
            length = max(tokens - from_prefill, 1)
            remember(state.recent_outputs, state.sorted_outputs, count, length)
            if known is not None:
                add_length(Lengths(state.cell_ended, state.cell_cut, state.cell_count), ALL, length, False)
        for instance, profile in enumerate(self.decode):
            state.total_blocks[instance] = profile.kv_tokens // profile.block_size
            state.step_model[instance] = profile.step.row()
        state.free[:] = state.total_blocks
        for instance, profile in enumerate(self.prefill):
            state.prefill_free[instance] = profile.kv_tokens
            state.prefill_step_model[instance] = profile.step.row()
        preempts_largest = self.preset.preempts_largest and predicts
        state.ttft[:], state.tpot[:], state.gap[:] = self.ttft_s, self.tpot_s, self.gap_s
        apply(self.classes, self._class_of(), state)
        if loop is not None:
            state.admission_settings_array[0] = tuple(loop)
        dispatch = DISPATCHERS[self.preset.dispatch]
        sees_cached = self.prefix_caching and dispatch.sees_prefixes(self.preset.dispatch_settings)
        mode = IMMEDIATE if not admission.queues_requests else BY_PYTHON_POLICY if loop is None else BY_COMPILED_LOOP
        parameters = {
            "block_size": first.block_size,
            "token_budget": first.max_num_batched_tokens,
            "max_batch": slots,
            "watermark_blocks": int(first.watermark * state.total_blocks.min()),
            "kv_bytes_per_token": first.kv_bytes_per_token,
            "bandwidth_bytes_s": first.bandwidth_bytes_s,
            "latency_s": first.latency_s,
            "stall_s": first.stall_s,
            "dispatch_rule": CALL_CHOOSE if sees_cached else dispatch.rule,
            "admission_mode": mode,
            "preempts_largest": preempts_largest,
            "first_come_first_served": not preempts_largest,
            "seed": self.seed,
            "sigma_start": 0.0 if exact else self.error.start,
            "sigma_end": 0.0 if exact else self.error.end,
            "sigma_tokens": self.error.tokens_at(float(work.output_tokens.mean())),
            "has_predictions": predicts,
            "residual_life": estimates,
            "longest_output": self.limit_tokens or int(work.output_tokens.max()),
            "ended_before": len(self.ended_before),
            "prefill_resumes": room >= longest,
            "first_at_prefill": bool(from_prefill),
            "cached_block_tokens": 0 if named is None else named.tokens,
            "calls_prefill_policy": bool(self.prefill) and self.preset.prefill != Preset().prefill,
        }
        state.parameters_array[0] = tuple(parameters[name] for name in PARAMETERS.names or ())
        state.current.next_ttft_miss_s = state.current.call_policy_at_s = np.inf
        return state

    def _cached_blocks(self) -> tuple[int, int]:
        """Return how many blocks the prompts have, and most that an instance can cache; ValueError: not known."""
        if not self.prefix_caching:
            return 0, 0
        named, size = self.workload.blocks, self.decode[0].block_size
        if named is None:
            raise ValueError("prefix caches need a trace that names the blocks of its prompts (hash_ids)")
        if named.tokens % size:
            raise ProfileError(f"block_size: blocks of the trace ({named.tokens} tokens) must be multiples of {size}")
        return len(named.names), max(p.kv_tokens for p in (*self.decode, *self.prefill)) // named.tokens + 1

    def _class_of(self) -> NDArray[np.int64]:
        return assign(self.classes, len(self.workload), self.seed)

    def run(self, progress: Callable[[float], None] | None = None) -> Outcome:
        """Run to the last completion; `progress` is called with the share of requests that are done."""
        state = self.build()
        work = self.workload
        decode = len(self.decode)
        from_prefill = self.first_at_prefill and bool(self.prefill)
        policy = rebalancer(self.preset.rebalance, self.preset.rebalance_settings)
        moves_requests = self.preset.moves
        avoids_oom = self.preset.avoids_oom and bool(state.parameters.has_predictions)
        oom_settings = OomAvoidanceSettings(lookahead_s=2.0 * self.period_s + self.decode[0].stall_s)
        span = max(float(work.arrival_s[-1]), 1.0)
        sampling = max(span / _SAMPLES, self.period_s if moves_requests else 0.05)
        period = self.period_s if moves_requests or self.roles is not None else sampling
        failures = sorted(self.failures)
        telemetry = Telemetry(self.preset, self.decode[0], state)
        python_policies = PythonPolicies(self.preset, telemetry)
        roles = None
        if self.roles is not None:
            objectives = (self.ttft_s, self.tpot_s)
            roles = SimulatedRoles(state, telemetry.cluster, self.roles, self.decoding, *objectives)
        samples: list[tuple[float, NDArray[np.float64], int]] = []
        moves: list[MoveRecord] = []
        decisions: list[float] = []
        now = next_sample = idle_s = 0.0
        begin = time.perf_counter()
        more = True
        while more or state.current.finished < len(work):
            now += period
            while failures and failures[0][0] <= now:
                moment, broken = failures.pop(0)
                python_policies.run_until(moment)
                fail_instance(state, broken, moment)
            more = python_policies.run_until(now)
            free_expired_kv(state, now)
            refresh_and_admit(state, now)
            python_policies.decide_periodically(now)
            if roles is not None:
                roles.step(now)
            if moves_requests:
                if avoids_oom:
                    suspend_preempted(state, now)
                cluster = telemetry.cluster(now)
                before = time.perf_counter()
                oom_actions = []
                if avoids_oom:
                    progress_now = partial(telemetry.progress, len(cluster.location), now)
                    oom_actions = avoid_oom(cluster, oom_settings, progress_now)
                ordered = exclude_conflicts(decide_moves(policy, cluster), oom_actions)
                decisions.append(time.perf_counter() - before)
                moves += carry_out(state, cluster, [*oom_actions, *ordered], now)
            if now >= next_sample:
                shares = np.empty(decode)
                kv_shares(state, now, shares)
                samples.append((now, shares, int(state.current.queue_size)))
                next_sample = now + sampling
                if progress is not None:
                    progress(int(state.current.finished) / len(work))
            # Without any event, pinned KV of waiting requests still expires, which makes room in prefill.
            idle_s = 0.0 if more or state.tree[1] < np.inf else idle_s + period
            if state.current.finished < len(work) and idle_s > PREFILLED_KV_KEPT_S + period:
                raise RuntimeError(f"stuck at {now:g} s: {state.current.finished} of {len(work)} requests done")
        wall = time.perf_counter() - begin
        return Outcome(
            preset=self.preset_name,
            workload=work,
            first_token_s=state.first_token,
            classes=names(self.classes),
            class_of=self._class_of(),
            longest_gap_s=state.longest_gap,
            # An output of one token has ended with its prefill.
            finish_s=np.where(from_prefill & (work.output_tokens == 1), state.first_token, state.finish),
            preempted=state.preempted,
            moved=state.moved,
            preemptions=int(state.current.preemptions),
            oom_events=int(state.current.oom_events),
            migrations=int(state.current.migrations),
            suspensions=int(state.current.suspensions),
            migrated_bytes=int(state.current.migrated_bytes),
            sample_s=np.array([moment for moment, _, _ in samples]),
            kv_use=np.array([use for _, use, _ in samples]),
            queued=np.array([queued for _, _, queued in samples], np.int64),
            moves=moves,
            events=int(state.current.events),
            simulated_s=float(np.max(state.finish)),
            wall_s=wall,
            decision_s=np.asarray(decisions),
            state=state,
            role_changes=roles.records if roles is not None else [],
        )
