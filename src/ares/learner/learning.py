"""The learner's decisions: it plans work, and turns its results, and the operator's commands, into champions.

Nothing here waits, or talks to an instance: `service.py` does.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from ares.learner import state as states
from ares.learner import trial
from ares.learner.cohort import Recorded, settled
from ares.learner.errors import LearnerError
from ares.learner.folder import Folder
from ares.learner.history import Event, History
from ares.learner.jobs import Judged, Trained
from ares.learner.recorded import Accepted, Store
from ares.learner.settings import LearnerSettings
from ares.learner.shipped import Shipped
from ares.learner.state import CURVE, State
from ares.learner.trial import CHALLENGER, CHAMPION, Scored, Verdict
from ares.learner.versions import Status, Version, Versions, hash_of
from ares.learner.work import Kind, Planner, Work
from ares.predictor.errors import PredictorError

logger = logging.getLogger(__name__)

_KEPT_LOSSES = 200
# Without news, the cohort is looked at again after this long: outputs that still run may count as lost by then.
_LOOK_S = 10.0
# A look at a trial that fails, such as for lack of memory, is tried so many times, and so long after one another.
_TRIES, _RETRY_S = 3, 60.0


class Learning:
    """A learner's folder, opened; the lock is held by the caller.

    Parameters
    ----------
    shipped
        Checkpoints that instances may have been started with, by version.
    read_recorded
        Whether the recorded states are needed, which may be gigabytes.

    Attributes
    ----------
    state, store, versions, history
        What is in the folder.
    losses
        The newest mean losses, as the report has them.

    Raises
    ------
    LearnerError
        The folder belongs to another model, or cannot be written.
    """

    def __init__(
        self, folder: Folder, settings: LearnerSettings, shipped: Mapping[str, Shipped], *, read_recorded: bool = True
    ) -> None:
        folder.prepare()
        self.folder = folder
        self.settings = settings
        self._shipped = shipped
        self.history = History(folder.history)
        self.versions = Versions(folder.versions, settings.keep_versions)
        self.state = self._opened()
        if settings.model and self.state.model not in ("", settings.model):
            raise LearnerError(
                f"{folder.path} belongs to {self.state.model}, not to {settings.model}: give another --folder"
            )
        accepted = Accepted(self.state.model or settings.model or "", self.state.hidden_size, self.state.every)
        self.store = Store(folder.recorded, accepted, self.state.number)
        if read_recorded:
            self.store.open()
        self.planner = Planner(settings, self.state, self.store, self.versions)
        self.losses: deque[dict[str, Any]] = deque(maxlen=_KEPT_LOSSES)
        self._looked = (-1, 0.0)
        self._unsaved = True
        self._full = False
        self._noted: set[str] = set()
        # Of looks at the trial of this challenger.
        self._failures = 0

    # --- work ---

    def next(self) -> Work | None:
        """Return the work that is due, if any."""
        now = time.monotonic()
        if self._looked[0] == self.store.number and now - self._looked[1] < _LOOK_S:
            return None
        accepted = self.store.accepted
        if self.state.every != accepted.every:
            self.state.model, self.state.hidden_size = accepted.model, accepted.hidden_size
            self.state.every = accepted.every
        work = self.planner.next(self.cohort(now), now)
        self._note_obstacles()
        if work is None:
            self._looked = (self.store.number, now)
        elif work.kind is Kind.TRAINING:
            self.planner.tried = now
            self.state.trainings += 1
        return work

    def _note_obstacles(self) -> None:
        """Add an event for what keeps a training or a check from being made, once until it no longer does."""
        found = {"no training begins": self.planner.obstacle}
        if self.state.champion != CURVE:  # the curve need not be compared with itself
            found["the champion cannot be compared with the curve"] = self.planner.unchecked
        noted = {what for what, why in found.items() if why}
        for what in sorted(noted - self._noted):
            self.add("error", f"{what}: {found[what]}")
        self._noted = noted

    def cohort(self, now: float) -> list[Recorded]:
        """Return the outputs that may be trained on, in order of arrival."""
        return settled(self.store.outputs.values(), now, self.settings.stale_s)

    def done(self, work: Work, result: Trained | Judged) -> None:
        """Take the result of a work."""
        self._changed()
        if isinstance(result, Trained):
            if self.state.frozen:
                self.ended()
            else:
                self._trained(work, result)
            return
        if self.state.frozen or (work.champion, work.challenger) != (self.state.champion, self.state.challenger):
            return
        if work.champion == CURVE:
            for one in result.scored:
                one.losses[CHAMPION] = one.losses[trial.CURVE]
        if work.kind is Kind.TRIAL:
            self._look(result.scored, last=work.last)
        else:
            self.planner.checked = (work.champion, work.newest)
            self._check(work, result.scored)

    def ended(self) -> None:
        """Note that a training has been ended, or its result is of no use, since the champion is frozen."""
        self._changed()
        self.versions.unfinished.unlink(missing_ok=True)
        self.planner.tried = -math.inf
        logger.info("a training is dropped, since the champion is frozen; it begins again afterwards")

    def failed(self, work: Work, why: str) -> None:
        """Take the failure of a work: the champion stays, and it is tried again later."""
        self._changed()
        doing = "training" if work.kind is Kind.TRAINING else "judging"
        lost = self.store.check_again(work.files)
        also = f"; {lost} damaged shards are left out from now on" if lost else ""
        damaged = self._give_up_damaged()
        self.add("error", f"{doing} failed: {why}{'' if damaged else '; the champion stays'}{also}")
        if lost:
            self.planner.tried = -math.inf
        if lost or damaged:
            return
        if work.kind is Kind.CHECK:
            self.planner.checked = (work.champion, work.newest)
        elif work.kind is Kind.TRIAL and work.challenger == self.state.challenger is not None:
            self._failures += 1
            self.planner.judge_from = time.monotonic() + _RETRY_S
            if self._failures >= _TRIES and not self.state.frozen:
                self._drop(self.state.challenger, f"it could not be judged, {self._failures} times: {why}")

    def _trained(self, work: Work, result: Trained) -> None:
        state = self.state
        try:
            version = hash_of(self.versions.unfinished)
            described = Version(
                version=version,
                model=state.model,
                hidden_size=state.hidden_size,
                through=work.through,
                outputs=work.outputs,
                pairs=result.pairs,
                seed=state.trainings - 1,
            )
            self.versions.add(self.versions.unfinished, described)
        except (OSError, PredictorError) as error:
            self.add("error", f"the new checkpoint could not be stored: {error}; the champion stays")
            return
        state.trained_through, state.trained_outputs = work.through, work.outputs
        state.challenger, state.looks = version, 0
        self._failures = 0
        self.add(
            "trained",
            f"trained on {work.outputs} complete outputs ({result.pairs} states) in {result.epochs} epochs, "
            f"validation CRPS {result.validation_crps:.1f}; it is tried on the next outputs",
            version,
            outputs=work.outputs,
            pairs=result.pairs,
            validation_crps=result.validation_crps,
        )
        self.versions.prune({state.champion, version})

    def _look(self, scored: list[Scored], *, last: bool) -> None:
        state, settings = self.state, self.settings
        challenger = state.challenger
        if challenger is None:
            return
        cut = " (the last look: the bounds of what is stored allow no more outputs)" if last else ""
        last = last or state.looks + 1 >= len(settings.looks)
        if not scored:
            self._drop(challenger, "none of the outputs of its trial could be read")
            return
        seen = trial.look(scored, settings.confidence, settings.fewest_prompts, last=last, seed=state.trainings)
        losses = {role: trial.mean(scored, role) for role in (trial.CURVE, CHAMPION, CHALLENGER)}
        against = "the curve" if state.champion == CURVE else state.champion[:12]
        text = (
            f"CRPS {losses[CHALLENGER]:.1f} against {losses[CHAMPION]:.1f} tokens of {against} on {len(scored)} "
            f"outputs of {seen.overall.prompts} prompts: difference {seen.overall}, of long outputs {seen.long} "
            f"({settings.confidence:.1%} intervals){cut}"
        )
        numbers: dict[str, float] = {"outputs": len(scored), "prompts": seen.overall.prompts}
        numbers |= {f"crps_{role}": round(loss, 4) for role, loss in losses.items()}
        numbers |= seen.overall.numbers("difference") | seen.long.numbers("difference_long")
        numbers |= seen.curve.numbers("difference_curve")
        state.looks += 1
        if seen.verdict is Verdict.PROMOTE:
            self._crown(challenger)
            self.add("promoted", f"promoted: {text}", challenger, **numbers)
        elif seen.verdict is Verdict.REJECT:
            self._drop(challenger, text, **numbers)
        else:
            logger.info("the trial of %s continues: %s", challenger[:12], text)

    def _check(self, work: Work, scored: list[Scored]) -> None:
        settings, state = self.settings, self.state
        if not scored:
            return
        newest = scored[-settings.check_outputs :]
        challenger = trial.mean(newest, CHALLENGER) if CHALLENGER in newest[0].losses else None
        row = {"time": time.time(), "outputs": len(newest), "position": "all"}
        row |= {role: round(trial.mean(newest, role), 3) for role in (trial.CURVE, CHAMPION)}
        self.losses.append(row | {CHALLENGER: None if challenger is None else round(challenger, 3)})
        if state.champion == CURVE:
            return
        found = trial.difference(scored, CHAMPION, trial.CURVE, settings.window_confidence, state.trainings)
        if not found.worse or found.prompts < settings.fewest_prompts:
            return
        demoted = state.champion
        self._mark(demoted, Status.DEMOTED)
        back = state.fall_back(self._good())
        self._now_champion(back)
        # What came before is of another kind, it seems.
        state.train_from, state.trained_outputs = work.began, 0
        self.planner.tried = -math.inf
        self.add(
            "demoted",
            f"demoted: CRPS {trial.mean(scored, CHAMPION):.1f} against {trial.mean(scored, trial.CURVE):.1f} tokens of "
            f"the curve on the newest {len(scored)} outputs: difference {found} ({settings.window_confidence:.1%} "
            f"interval); the champion is now {_name(back)}",
            demoted,
            outputs=len(scored),
            prompts=found.prompts,
            **found.numbers("difference"),
        )
        if state.challenger is not None:
            self._drop(state.challenger, "it was trained on the same outputs as the demoted champion")

    def _give_up_damaged(self) -> bool:
        """Give up champion and challenger where their files are damaged; return whether one is."""
        both = (self.state.champion, self.state.challenger)
        damaged = [one for one in both if one is not None and one in self.versions and not self.versions.whole(one)]
        for version in damaged:
            self.lost(version)
        return bool(damaged)

    # --- champions ---

    def lost(self, version: str) -> None:
        """Give up a version whose file is gone or damaged; of the champion, the one before it takes over again."""
        self.versions.give_up(version)
        text = f"the file of {version[:12]} is gone or damaged"
        if version == self.state.champion:
            self._replace_champion(self.state)
            self._now_champion(self.state.champion)
            text += f"; the champion is now {_name(self.state.champion)}"
        elif version == self.state.challenger:
            self.state.challenger = None
            text += "; another one is trained"
        self.add("error", text, version)
        self._changed()

    def wanted(self, running: str) -> str | None:
        """Return the version that an instance should run, which now runs `running`; None to leave it alone."""
        if self.state.decided or running == CURVE or running in self.versions:
            return self.state.champion
        return None

    def found_at(self, instance: str, running: str) -> None:
        """Take note of what an instance runs: in a new folder, a checkpoint that ships is the first champion."""
        state = self.state
        if state.decided or state.champion != CURVE or running == CURVE or running in self.versions:
            return
        found = self._shipped.get(running)
        if found is None or (state.model or self.settings.model or found.model) != found.model:
            return
        try:
            described = Version(
                version=running, model=found.model, hidden_size=found.hidden_size, status=Status.CHAMPION
            )
            self.versions.add(found.path, described)
        except OSError as error:
            logger.warning("%s: cannot be copied into the folder: %s", found.path, error)
            return
        state.champion, state.since = running, time.time()
        self.add("promoted", f"the first champion is {found.path.name}, which {instance} runs already", running)
        self._changed()

    def _replace_champion(self, state: State) -> None:
        """Put the champion before it in the place of one that is lost."""
        if state.decided:
            state.fall_back(self._good())
        else:  # a copy of what the instances were started with: it is copied again
            state.champion = CURVE

    def rollback(self, wanted: str = "") -> str:
        """Make the champion before this one champion, or a given version (or its beginning, or ``curve``).

        Raises
        ------
        LearnerError
            There is no such version, or nothing to go back to.
        """
        state, old = self.state, self.state.champion
        if wanted in ("", old):
            if old == CURVE:
                raise LearnerError("the residual-life curve is the champion already: there is nothing to roll back to")
            if wanted:
                raise LearnerError(f"{_name(old)} is the champion already")
            # Also one that has been rolled back from by hand: it was the champion before this one.
            new = state.fall_back(self.versions.names)
        else:
            found = [CURVE] if wanted == trial.CURVE else self.versions.find(wanted)
            if len(found) != 1:
                known = ", ".join(version.version[:12] for version in reversed(self.versions.all)) or "none"
                raise LearnerError(f"{wanted!r} matches {len(found) or 'none'} of the versions: {known}, or curve")
            new = found[0]
            if new == old:
                raise LearnerError(f"{_name(new)} is the champion already")
            state.crown(new)
        self._mark(old, Status.DEMOTED)
        self._now_champion(new)
        text = f"rolled back by hand from {_name(old)} to {_name(new)}"
        self.add("rolled_back", text, old)
        self._changed()
        return text

    def freeze(self, *, frozen: bool) -> str:
        """Stop training, promoting and demoting, or begin again."""
        text = (
            "frozen: nothing is trained, promoted or demoted until `ares predictor freeze --off`"
            if frozen
            else "no longer frozen"
        )
        if self.state.frozen == frozen:
            return f"{'frozen' if frozen else 'not frozen'} already"
        self.state.frozen = frozen
        self.add("frozen" if frozen else "unfrozen", text, self.state.champion)
        self._changed()
        return text

    def _crown(self, version: str) -> None:
        self.state.crown(version)
        self._now_champion(version)

    def _now_champion(self, version: str) -> None:
        if version != CURVE:
            self._mark(version, Status.CHAMPION)
            return
        for other in self.versions.all:  # so that the folder shows it without its state
            if other.status is Status.CHAMPION:
                self._mark(other.version, Status.DEMOTED)

    def _drop(self, challenger: str, why: str, **numbers: float) -> None:
        self._mark(challenger, Status.REJECTED)
        self.state.challenger = None
        self.add("rejected", f"rejected: {why}", challenger, **numbers)

    def _good(self) -> set[str]:
        return {version.version for version in self.versions.all if version.status is Status.CHAMPION}

    # --- keeping it ---

    def add(self, event: Event, text: str, version: str = "", **numbers: float) -> None:
        """Add an event and log it."""
        entry = self.history.add(event, text, version, **numbers)
        level = logging.WARNING if event in ("error", "refused") else logging.INFO
        logger.log(level, "%s%s", entry["text"], f" ({version[:12]})" if version else "")
        self._unsaved = True

    def _mark(self, version: str, status: Status) -> None:
        """Store what became of a version, where the disk has room."""
        try:
            self.versions.mark(version, status)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self.folder.versions, error)

    def save(self) -> None:
        """Write state and events where they have changed; a full disk is a line, and the next call tries again."""
        if not self._unsaved and self.state.number == self.store.number:
            return
        self.state.number = self.store.number
        try:
            states.write(self.folder.state, self.state)
            self.history.flush()
        except OSError as error:
            if not self._full:
                logger.warning("%s: cannot be written: %s; tried again until there is room", self.folder.path, error)
            self._full = self._unsaved = True
        else:
            if self._full:
                logger.info("%s: can be written again", self.folder.path)
            self._full = self._unsaved = False

    def _changed(self) -> None:
        self._unsaved = True
        self._looked = (-1, 0.0)

    def _opened(self) -> State:
        """Return the state of the folder, or what its versions show where the state is not readable."""
        there = self.folder.state.exists()
        found = states.read(self.folder.state)
        if found is None:
            found = self._recovered()
            if there or self.versions.all:
                text = f"{self.folder.state.name} was not readable; begun again from the versions"
                frozen = "frozen" if found.frozen else "not frozen"
                text += f": the champion is {_name(found.champion)}, and it is {frozen}"
                self.history.add("error", text, found.champion)
        for version in (found.champion, found.challenger):
            if version not in (CURVE, None) and version not in self.versions:
                self.history.add("error", f"the file of {version[:12]} is gone or damaged: it is given up", version)
        if found.champion not in {CURVE, *self.versions.names}:
            self._replace_champion(found)
        if found.challenger is not None and found.challenger not in self.versions:
            found.challenger = None
        return found

    def _recovered(self) -> State:
        state = State()
        freezes = [event["event"] for event in self.history.events if event["event"] in ("frozen", "unfrozen")]
        state.frozen = freezes[-1:] == ["frozen"]
        for version in self.versions.all:
            state.model, state.hidden_size = version.model, version.hidden_size
            state.number = max(state.number, version.through)
            state.decided = True
            if version.outputs:
                state.trainings += 1
                state.trained_through, state.trained_outputs = version.through, version.outputs
            if version.status is Status.CHAMPION:
                state.champion = version.version
            elif version.status is Status.CHALLENGER:
                state.challenger = version.version
        return state


def _name(version: str) -> str:
    return "the residual-life curve" if version == CURVE else version[:12]
