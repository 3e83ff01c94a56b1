"""What an admission policy is: it lets requests into decode, chooses where, and may suspend running ones.

The simulator's event loop calls the loop of forecast.py (loop.py) as machine code: a class that decides by it gives
its settings by `loop_settings`, and every other class is asked in Python.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ares.policy.admission.state import Knobs
from ares.policy.admission.suspension import final_slack_s
from ares.policy.base import DecisionError, Policy, is_index, raised
from ares.policy.cluster import BoolArray, Cluster, FloatArray, IntArray
from ares.policy.registry import Class, Registry


@dataclass(frozen=True, slots=True)
class Progress:
    """How requests stand against their objectives; all arrays have one element a request.

    Attributes
    ----------
    generated
        Output tokens so far.
    age_s, elapsed_s
        Seconds since it arrived, and since its first token (NaN: it has none).
    ttft_s, tpot_s, gap_s
        The objectives: time to first token, seconds a token, longest gap in the stream (infinite: none).
    longest_gap_s
        Longest gap that the stream has had.
    rank
        Class of each: a smaller one goes before every larger one.
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
    def silent(self) -> BoolArray:
        """Whether the longest gap of the stream has missed its objective."""
        missed: BoolArray = self.longest_gap_s > self.gap_s
        return missed

    @property
    def late(self) -> BoolArray:
        """Whether the first token has missed its objective."""
        return self.age_s - np.nan_to_num(self.elapsed_s) > self.ttft_s

    def spare(self, remaining: FloatArray, step_s: FloatArray | float) -> tuple[FloatArray, BoolArray]:
        """Return the seconds that running requests may stand still, and which miss their objectives even without.

        Parameters
        ----------
        remaining
            Quantiles of what each will still generate, shape (R, Q).
        step_s
            Seconds a token takes, shape (R,) or one for all.
        """
        known = (self.tpot_s, self.generated, np.nan_to_num(self.elapsed_s))
        least: FloatArray = final_slack_s(*known, remaining[:, 0], step_s)  # type: ignore[arg-type,assignment]
        most: FloatArray = final_slack_s(*known, remaining[:, -1], step_s)  # type: ignore[arg-type,assignment]
        return np.minimum(least, self.gap_s), self.late | (most < 0.0)


@dataclass(frozen=True, slots=True)
class Candidates:
    """W requests outside decode: prefilled ones that wait, and suspended ones.

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
class AdmissionDecision:
    """One decision: a candidate enters `instance`, or the running row `index` of the cluster is suspended there."""

    kind: Literal["enter", "resume", "suspend"]
    index: int
    instance: int
    reason: str


class Admission(Policy):
    """Base class of an admission policy; one object decides for the whole run, so it may remember.

    It is asked when something has changed: one has come, ended or left, and now and then in any case.

    Attributes
    ----------
    holds
        Whether requests wait outside decode until they are let in; otherwise dispatch places them at once, and the
        policy is never asked.
    dispatch
        Of one that holds, the dispatch that goes with it: it places requests where the policy itself has failed.
    watches
        Whether it is also asked while nobody is outside, since it suspends for other reasons than a request that waits.
    """

    part: ClassVar[str] = "admission"
    holds: ClassVar[bool] = True
    dispatch: ClassVar[str] = "least_loaded"
    watches: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "decide" in vars(cls):
            # What is said of an inherited `decide` does not hold for another one.
            for name, usual in (("loop_settings", vars(Admission)["loop_settings"]), ("quick", False)):
                if name not in vars(cls):
                    setattr(cls, name, usual)

    @classmethod
    def loop_settings(cls, settings: Any) -> Knobs | None:
        """Return the settings of the loop (loop.py) that `decide` calls; None: it calls none, or not it alone."""
        return None

    @classmethod
    def preempts_largest(cls, settings: Any) -> bool:
        """Return whether instances preempt the largest predicted memory-time (order.py), instead of the newest."""
        return False

    @classmethod
    def rescues(cls, settings: Any) -> bool:
        """Return whether full instances are relieved (rescue.py), and what they have preempted is suspended."""
        return False

    def learn(self, output_tokens: int) -> None:
        """Take note of a request that has ended, with the length of its output."""

    def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> list[AdmissionDecision]:
        """Return what to do now, in this order; whoever is not named stays where it is.

        Parameters
        ----------
        cluster
            The decode pool; requests that are on their way to an instance are rows there.
        candidates
            Who is outside.
        running
            How the rows of the cluster stand, R elements.
        """
        raise NotImplementedError


ADMISSIONS: Registry[Admission] = Registry(
    Admission, "decide(self, cluster, candidates, running)", lambda policy: not policy.holds
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
    """Ask a policy for its entries.

    Parameters
    ----------
    policy
        The policy.
    cluster, candidates, running
        As its `decide` takes them.
    ended
        Lengths of the outputs that have ended since it was asked last, in that order.

    Raises
    ------
    DecisionError
        It raised, or what it returned is no list of entries that can be carried out.
    """
    try:
        for tokens in ended:
            policy.learn(tokens)
        entries = policy.decide(cluster, candidates, running)
    except Exception as error:
        raise raised(policy, error) from error
    check_admissions(policy.name, entries, cluster, candidates)
    return entries


def check_admissions(policy: str, entries: object, cluster: Cluster, candidates: Candidates) -> None:
    """Raise DecisionError where what a policy returned is no list of entries that can be carried out."""
    if not isinstance(entries, list) or not all(isinstance(entry, AdmissionDecision) for entry in entries):
        said = f"must return a list of AdmissionDecision, not {str(entries)[:80]}"
        raise DecisionError(policy, "not_entries", said, Admission.part)
    seen: set[tuple[bool, int]] = set()
    for entry in entries:
        if wrong := _wrong(entry, cluster, candidates, seen):
            raise DecisionError(policy, wrong[0], f"decided {entry}: {wrong[1]}"[:300], Admission.part)
        seen.add((entry.kind == "suspend", int(entry.index)))


def _wrong(
    entry: AdmissionDecision, cluster: Cluster, candidates: Candidates, seen: set[tuple[bool, int]]
) -> tuple[str, str] | None:
    """Return in a word and in full why an entry cannot be carried out."""
    if entry.kind not in ("enter", "resume", "suspend"):
        return "unknown_kind", "kind must be enter, resume or suspend"
    out = entry.kind == "suspend"
    rows, count = len(cluster.location) if out else len(candidates.tokens), len(cluster.instances)
    if not is_index(entry.index, rows):
        return "unknown_request", f"index must be from 0 to {rows - 1}"
    if not is_index(entry.instance, count):
        return "unknown_instance", f"instance must be an index from 0 to {count - 1}"
    checks = [
        ("repeated", (out, int(entry.index)) in seen, "the request is named twice"),
        ("reason", not isinstance(entry.reason, str) or not entry.reason, "it must say its reason"),
    ]
    if out:
        checks += [
            ("wrong_source", cluster.location[entry.index] != entry.instance, "the request is not there"),
            ("not_movable", not cluster.movable[entry.index], "the request cannot be suspended now"),
        ]
    else:
        kind = "resume" if candidates.suspended[entry.index] else "enter"
        barred = candidates.barred is not None and candidates.barred[entry.index, entry.instance]
        checks += [
            ("wrong_kind", entry.kind != kind, f"the request is to {kind}"),
            ("closed_instance", not cluster.open[entry.instance], "the instance takes no requests now"),
            ("barred_instance", bool(barred), "the request does not enter that instance"),
        ]
    return next(((kind, said) for kind, wrong, said in checks if wrong), None)
