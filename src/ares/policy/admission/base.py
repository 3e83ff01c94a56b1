"""What an admission policy is: it admits requests to decode, chooses where, and may suspend running ones.

The loop of forecast.py (loop.py) is compiled into the simulator's event loop: a class whose `decide` is that loop
returns its settings from `loop_settings`; every other class is called in Python.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ares.policy.admission.state import LoopSettings
from ares.policy.admission.suspension import final_slack_s
from ares.policy.base import DecisionError, Policy, is_index, raised
from ares.policy.cluster import BoolArray, Cluster, FloatArray, IntArray
from ares.policy.registry import Class, Registry

PREFILLED_KV_KEPT_S = 20.0
"""How long the KV of a prefill is kept for a request that waits for admission; after that it is prefilled again.

An instance keeps KV for 30 s (vLLM's kv_lease_duration), and a later pull could read blocks that belong to another
request by then.
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of requests towards their objectives; all arrays have one element per request.

    Attributes
    ----------
    generated
        Output tokens so far.
    age_s, elapsed_s
        Seconds since each request arrived, and since its first token (NaN: none yet).
    ttft_s, tpot_s, gap_s
        The objectives: time to first token, seconds per token, longest gap in the stream (infinite: none).
    longest_gap_s
        Longest gap in the stream so far.
    rank
        Rank of each request's class: a smaller one goes before every larger one.
    """

    generated: IntArray
    age_s: FloatArray
    elapsed_s: FloatArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    gap_s: FloatArray
    longest_gap_s: FloatArray
    rank: IntArray

    @property
    def gap_missed(self) -> BoolArray:
        """Whether the longest gap of the stream has missed its objective."""
        missed: BoolArray = self.longest_gap_s > self.gap_s
        return missed

    @property
    def ttft_missed(self) -> BoolArray:
        """Whether the first token has missed its objective."""
        return self.age_s - np.nan_to_num(self.elapsed_s) > self.ttft_s

    def slack(self, remaining: FloatArray, step_s: FloatArray | float) -> tuple[FloatArray, BoolArray]:
        """Return for how many seconds each running request may be suspended, and which ones are SLO-infeasible.

        A request is SLO-infeasible when it misses its objectives whatever is done.

        Parameters
        ----------
        remaining
            Quantiles of what each will still generate, shape (R, Q).
        step_s
            Seconds per token, shape (R,) or one for all.
        """
        known = (self.tpot_s, self.generated, np.nan_to_num(self.elapsed_s))
        least: FloatArray = final_slack_s(*known, remaining[:, 0], step_s)  # type: ignore[arg-type,assignment]
        most: FloatArray = final_slack_s(*known, remaining[:, -1], step_s)  # type: ignore[arg-type,assignment]
        return np.minimum(least, self.gap_s), self.ttft_missed | (most < 0.0)


@dataclass(frozen=True, slots=True)
class Candidates:
    """W requests outside decode: prefilled ones that wait, and suspended ones.

    Attributes
    ----------
    requests
        Identifiers, length W.
    tokens
        KV tokens of each, shape (W,).
    remaining_tokens
        Quantiles of what each will still generate, at the cluster's levels, shape (W, Q).
    rank
        Rank of each request's class, shape (W,): a smaller one goes before every larger one.
    waited_s
        Seconds since it arrived, or was suspended, shape (W,).
    suspended
        Whether it has run before, shape (W,).
    progress
        Their progress towards their objectives.
    excluded
        Instances that may not take each request, shape (W, I): they have refused it, or cannot restore its state. None:
        no instance is excluded.
    cached_tokens
        Tokens of each, from the first on, that each instance has cached, shape (W, I). None: unknown, or of no
        interest.
    """

    requests: Sequence[str]
    tokens: IntArray
    remaining_tokens: FloatArray
    rank: IntArray
    waited_s: FloatArray
    suspended: BoolArray
    progress: Progress
    excluded: BoolArray | None = None
    cached_tokens: IntArray | None = None


@dataclass(frozen=True, slots=True)
class AdmissionDecision:
    """One decision: candidate `index` is admitted to `instance`, or row `index` of the cluster is suspended there."""

    kind: Literal["admit", "resume", "suspend"]
    index: int
    instance: int
    reason: str


class Admission(Policy):
    """Base class of an admission policy; one object decides for the whole run, so it may keep state.

    It is called when a request has arrived, ended or left, and periodically in any case.

    Attributes
    ----------
    queues_requests
        Whether requests wait in the gateway's queue until they are admitted to decode; otherwise each is dispatched at
        once, and `decide` is never called.
    dispatch
        Where `queues_requests`: the dispatch policy that it is combined with, which chooses the instance when the
        admission policy itself has failed.
    watches
        Whether it is also called while no request waits, because it suspends for other reasons too.
    """

    part: ClassVar[str] = "admission"
    queues_requests: ClassVar[bool] = True
    dispatch: ClassVar[str] = "least_loaded"
    watches: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "decide" in vars(cls):
            # What the base class declares of its `decide` does not hold for an overriding one.
            for name, usual in (("loop_settings", vars(Admission)["loop_settings"]), ("quick", False)):
                if name not in vars(cls):
                    setattr(cls, name, usual)

    @classmethod
    def loop_settings(cls, settings: Any) -> LoopSettings | None:
        """Return the settings of the loop (loop.py) that `decide` consists of; None: it is not that loop."""
        return None

    @classmethod
    def sees_prefixes(cls, settings: Any) -> bool:
        """Return whether it looks at `Candidates.cached_tokens` with these settings; otherwise there are none."""
        return False

    @classmethod
    def preempts_largest(cls, settings: Any) -> bool:
        """Return whether instances preempt the largest predicted memory-time (order.py), instead of the newest."""
        return False

    @classmethod
    def avoids_oom(cls, settings: Any) -> bool:
        """Return whether requests leave an instance before it runs out of memory (oom_avoidance.py).

        What instances have preempted is then suspended.
        """
        return False

    def learn(self, output_tokens: int) -> None:
        """Record the output length of a request that has ended."""

    def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> list[AdmissionDecision]:
        """Return what to do now, in this order; a request that is not named stays where it is.

        Parameters
        ----------
        cluster
            The decode pool; requests that are on their way to an instance are rows there.
        candidates
            The requests outside decode.
        running
            Progress of the rows of the cluster, R elements.
        """
        raise NotImplementedError


ADMISSIONS: Registry[Admission] = Registry(
    Admission, "decide(self, cluster, candidates, running)", lambda policy: not policy.queues_requests
)


def register(name: str) -> Callable[[Class], Class]:
    """Register the decorated class as the admission policy `name`."""
    return ADMISSIONS.register(name)


def admission_policy(name: str, settings: Any = None) -> Admission:
    """Make the policy called `name`, ready to decide; ValueError lists the known names, DecisionError: it cannot be."""
    return ADMISSIONS.make(name, settings)


def decide_admissions(
    policy: Admission,
    cluster: Cluster,
    candidates: Candidates,
    running: Progress,
    ended: Sequence[int] = (),
) -> list[AdmissionDecision]:
    """Call a policy for its decisions.

    Parameters
    ----------
    policy
        The policy.
    cluster, candidates, running
        As its `decide` takes them.
    ended
        Lengths of the outputs that have ended since its last call, in that order.

    Raises
    ------
    DecisionError
        It raised, or what it returned is no list of decisions that can be carried out.
    """
    try:
        for tokens in ended:
            policy.learn(tokens)
        decisions = policy.decide(cluster, candidates, running)
    except Exception as error:
        raise raised(policy, error) from error
    check_admissions(policy.name, decisions, cluster, candidates)
    return decisions


def check_admissions(policy: str, decisions: object, cluster: Cluster, candidates: Candidates) -> None:
    """Raise DecisionError where what a policy returned is no list of decisions that can be carried out."""
    if not isinstance(decisions, list) or not all(isinstance(decision, AdmissionDecision) for decision in decisions):
        message = f"must return a list of AdmissionDecision, not {str(decisions)[:80]}"
        raise DecisionError(policy, "not_decisions", message, Admission.part)
    seen: set[tuple[bool, int]] = set()
    for decision in decisions:
        if wrong := _wrong(decision, cluster, candidates, seen):
            raise DecisionError(policy, wrong[0], f"decided {decision}: {wrong[1]}"[:300], Admission.part)
        seen.add((decision.kind == "suspend", int(decision.index)))


def _wrong(
    decision: AdmissionDecision, cluster: Cluster, candidates: Candidates, seen: set[tuple[bool, int]]
) -> tuple[str, str] | None:
    """Return the kind of fault and a sentence where a decision cannot be carried out, else None."""
    if decision.kind not in ("admit", "resume", "suspend"):
        return "unknown_kind", "kind must be admit, resume or suspend"
    out = decision.kind == "suspend"
    rows, count = len(cluster.location) if out else len(candidates.tokens), len(cluster.instances)
    if not is_index(decision.index, rows):
        return "unknown_request", f"index must be from 0 to {rows - 1}"
    if not is_index(decision.instance, count):
        return "unknown_instance", f"instance must be an index from 0 to {count - 1}"
    checks = [
        ("repeated", (out, int(decision.index)) in seen, "the request is named twice"),
        ("reason", not isinstance(decision.reason, str) or not decision.reason, "it needs a reason"),
    ]
    if out:
        checks += [
            ("wrong_source", cluster.location[decision.index] != decision.instance, "the request is not there"),
            ("not_movable", not cluster.movable[decision.index], "the request cannot be suspended now"),
        ]
    else:
        kind = "resume" if candidates.suspended[decision.index] else "admit"
        excluded = candidates.excluded is not None and candidates.excluded[decision.index, decision.instance]
        checks += [
            ("wrong_kind", decision.kind != kind, f"the request can only {kind}"),
            ("closed_instance", not cluster.open[decision.instance], "the instance takes no requests now"),
            ("excluded_instance", bool(excluded), "the request is excluded from that instance"),
        ]
    return next(((kind, message) for kind, wrong, message in checks if wrong), None)
