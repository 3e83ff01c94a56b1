"""What a learner does next, if anything: look at the trial, compare the champion with the curve, or train."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from ares.learner import trial
from ares.learner.cohort import Recorded, files_of, newest
from ares.learner.jobs import Job, Judge, Train
from ares.learner.recorded import Store
from ares.learner.settings import LearnerSettings
from ares.learner.state import CURVE, State
from ares.learner.versions import Versions
from ares.predictor.dataset import too_few_prompts
from ares.predictor.shards import Outcome

# A curve that is fitted on fewer outputs is no opponent.
_CURVE_FEWEST = 100
# States in half precision, features in single precision, and copies of both while the training set is made.
_BYTES_PER_PAIR_AND_WIDTH = 40


class Kind(StrEnum):
    """Kinds of work."""

    TRAINING = "training"
    TRIAL = "trial"
    CHECK = "check"


@dataclass(frozen=True, slots=True)
class Work:
    """A job, and what it is about.

    Attributes
    ----------
    champion, challenger
        As they are when it starts: a result about others is of no use.
    files
        Arrival numbers of the shards that it reads.
    outputs
        How many complete outputs it has.
    began, newest
        First arrival numbers of the oldest and of the newest of them.
    through
        The newest arrival number when it was made.
    last
        Whether a look at a trial is its last one, since older outputs of the trial are deleted meanwhile.
    """

    kind: Kind
    job: Job
    champion: str
    challenger: str | None
    files: frozenset[int]
    outputs: int
    began: int
    newest: int
    through: int
    last: bool = False


@dataclass(slots=True)
class Planner:
    """Finds the next work.

    Attributes
    ----------
    checked
        The champion at the last comparison with the curve, and the first arrival number of its newest output.
    tried
        When the last training began (`time.monotonic`), if it is known.
    have, needed
        Complete outputs that count for what is waited for, and how many it takes.
    judge_from
        No trial is judged before this time (`time.monotonic`), since the last try failed.
    obstacle
        Why no training begins though there are enough outputs; empty where one may.
    unchecked
        Why the champion cannot be compared with the curve; empty where it can.
    """

    settings: LearnerSettings
    state: State
    store: Store
    versions: Versions
    checked: tuple[str, int] = ("", 0)
    tried: float = -math.inf
    have: int = 0
    needed: int = 0
    judge_from: float = -math.inf
    obstacle: str = ""
    unchecked: str = ""

    def next(self, outputs: list[Recorded], now: float) -> Work | None:
        """Return what is due with these outputs, the cohort in order of arrival."""
        if not outputs or self.state.frozen:
            return None
        complete = [output for output in outputs if output.complete]
        judges = self.state.challenger is not None and now >= self.judge_from
        found = self._trial(outputs, complete) if judges else None
        found = found or self._check(outputs, complete)
        return found or (self._training(outputs, complete, now) if self.state.challenger is None else None)

    def through(self, version: str | None) -> int:
        """Return the largest arrival number that a version was trained on."""
        return self.versions[version].through if version is not None and version in self.versions else 0

    def _trial(self, outputs: list[Recorded], complete: list[Recorded]) -> Work | None:
        state, looks = self.state, self.settings.looks
        through = max(self.through(state.champion), self.through(state.challenger))
        fresh = [output for output in complete if output.first > through]
        wanted = looks[min(state.looks, len(looks) - 1)]
        self.have, self.needed = len(fresh), wanted
        # What came first in the trial is deleted already: no more outputs than these will ever be there at once.
        last = len(fresh) < wanted and self.store.pruned > through
        if not fresh or (len(fresh) < wanted and not last):
            return None
        chosen = fresh[:wanted]
        # No outputs are older where the first champion was not trained here, or they have been deleted since.
        lacking = outputs[0].first >= chosen[0].first
        known = (fresh[wanted:] or chosen) if lacking else ()
        return replace(self._judge(Kind.TRIAL, outputs, chosen, known), last=last)

    def _check(self, outputs: list[Recorded], complete: list[Recorded]) -> Work | None:
        settings, champion = self.settings, self.state.champion
        self.unchecked = ""
        fresh = [output for output in complete if output.first > self.through(champion)]
        # The window, and before it outputs that the curve knows from the beginning.
        window = fresh[-settings.window_outputs :]
        horizon = outputs[min(_CURVE_FEWEST, len(outputs)) - 1].first
        window = [output for output in window if output.first > horizon]
        # A version that has become the champion again is compared at once; the curve itself is only reported.
        seen = self.checked[1] if champion in (self.checked[0], CURVE) else 0
        new = sum(output.first > seen for output in window)
        if len(window) < settings.window_fewest and self.store.pruned > self.through(champion):
            self.unchecked = (
                f"what is stored holds {len(outputs)} outputs, and it takes {_CURVE_FEWEST} and window_fewest "
                f"({settings.window_fewest}): raise keep_bytes or keep_days, or lower window_fewest"
            )
        if len(window) < settings.window_fewest or new < min(settings.check_outputs, len(window)):
            return None
        # The report compares the challenger on the newest outputs, where all of them are new to it.
        shown = window[-settings.check_outputs :][0].first > self.through(self.state.challenger)
        return self._judge(Kind.CHECK, outputs, window, with_challenger=shown)

    def _training(self, outputs: list[Recorded], complete: list[Recorded], now: float) -> Work | None:
        settings, state = self.settings, self.state
        since = [output for output in complete if output.first >= state.train_from]
        again = state.trained_outputs > 0
        self.have = sum(output.last > state.trained_through for output in since) if again else len(since)
        self.needed = math.ceil(settings.growth * state.trained_outputs) if again else settings.first_outputs
        # Where outputs that the next training could read are deleted already, there will never be more of them.
        full = self.store.pruned >= max(state.train_from, state.trained_through + 1)
        if (self.have < self.needed and not full) or now - self.tried < settings.pause_s:
            return None
        most = min(settings.most_pairs, settings.memory_bytes // (_BYTES_PER_PAIR_AND_WIDTH * state.hidden_size))
        chosen = newest([output for output in outputs if output.first >= state.train_from], most)
        self.obstacle = too_few_prompts(output.prompt for output in chosen) or ""
        if self.obstacle:
            return None
        job = Train(
            files=self._paths(chosen),
            requests=[output.request for output in chosen],
            checkpoint=str(self.versions.unfinished),
            seed=state.trainings,
            epochs=settings.epochs,
            threads=settings.threads,
            nice=settings.nice,
        )
        return self._work(Kind.TRAINING, job, chosen)

    def _judge(
        self,
        kind: Kind,
        outputs: list[Recorded],
        chosen: list[Recorded],
        known: Sequence[Recorded] = (),
        *,
        with_challenger: bool = True,
    ) -> Work:
        """Return the work of judging the chosen outputs.

        The curve gets to know the outputs of the cohort as they end, as in a gateway, and those `known` at once.
        """
        known_requests = {output.request for output in known}
        lengths = [
            (0 if o.request in known_requests else o.last, o.length, o.outcome is not Outcome.STOP) for o in outputs
        ]
        state = self.state
        roles = {trial.CHAMPION: state.champion, trial.CHALLENGER: state.challenger if with_challenger else None}
        job = Judge(
            files=self._paths(chosen),
            requests=[output.request for output in chosen],
            began=[output.first for output in chosen],
            checkpoints={role: str(self.versions.path(v)) for role, v in roles.items() if v is not None and v != CURVE},
            lengths=lengths,
            threads=self.settings.threads,
            nice=self.settings.nice,
        )
        return self._work(kind, job, chosen)

    def _work(self, kind: Kind, job: Job, chosen: list[Recorded]) -> Work:
        return Work(
            kind=kind,
            job=job,
            champion=self.state.champion,
            challenger=self.state.challenger,
            files=frozenset(files_of(chosen)),
            outputs=sum(output.complete for output in chosen),
            began=chosen[0].first,
            newest=chosen[-1].first,
            through=self.store.number,
        )

    def _paths(self, chosen: list[Recorded]) -> list[str]:
        return [str(self.store.path(number)) for number in sorted(files_of(chosen))]
