"""Whether `ares up` starts a learner, where it works, and which checkpoint the instances start with."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ares.terminal.errors import exit_with_error

LEARN = "learn"
_NONE = "none"


@dataclass(frozen=True, slots=True)
class LearnChoice:
    """The choice.

    Attributes
    ----------
    folder
        The learner's folder; None: there is none.
    predictor
        As `ares worker --predictor` takes it.
    """

    folder: Path | None
    predictor: str | None

    @property
    def worker_flags(self) -> tuple[str, ...]:
        """Flags of `ares worker`."""
        return ("--predictor", self.predictor) if self.predictor is not None else ()

    @property
    def learner_flags(self) -> tuple[str, ...]:
        """Flags of `ares predictor learn`: the checkpoint that the instances start with is the first champion."""
        given = self.predictor not in (None, _NONE, LEARN)
        return ("--checkpoint", str(Path(str(self.predictor)).resolve())) if given else ()


def choose(
    learn: bool | None, folder: Path | None, predictor: str | None, model: str, *, simulated: bool, console: Console
) -> LearnChoice:
    """Return what the options mean, and print it where they do not say; exit with an error where they contradict.

    Parameters
    ----------
    learn
        `--learn`, `--no-learn`, or None where neither is given: then a model without a checkpoint learns.
    folder, predictor
        `--learn-folder` and `--predictor`.
    """
    check(learn, folder, predictor, simulated=simulated)
    if simulated:
        return LearnChoice(None, predictor)
    wanted = learn or predictor == LEARN
    asked_for = wanted or folder is not None
    if learn is None and predictor is None and not wanted:
        from ares.learner.shipped import ships_for

        wanted = not ships_for(model)
    if not wanted:
        if folder is not None:
            exit_with_error("--learn-folder has no effect without --learn: give both")
        return LearnChoice(None, predictor)
    from ares.learner.folder import Folder
    from ares.models.cache import cache_folder

    where = folder or cache_folder() / "learner" / model.strip("/").replace("/", "--")
    if (holder := Folder(where).holder()) is not None:
        taken = f"{holder} works in {where} already: give another --learn-folder"
        if asked_for:
            exit_with_error(taken)
        _print(console, f"no predictor ships for {model}, and it learns none: {taken}, or --no-learn")
        return LearnChoice(None, predictor)
    learns = f"learns a predictor for {model} from the requests that it serves, in {where} (docs/learning.md)"
    _print(console, learns if asked_for else f"no predictor ships: {learns}; --no-learn turns that off")
    return LearnChoice(where.absolute(), predictor)


def check(learn: bool | None, folder: Path | None, predictor: str | None, *, simulated: bool) -> None:
    """Exit with an error where options contradict each other, or have no effect."""
    if simulated:
        given = {"--learn": learn, "--learn-folder": folder, "--predictor learn": predictor == LEARN}
        for option, value in given.items():
            if value:
                exit_with_error(f"{option} has no effect with --simulate: mock engines have no hidden states")
    if learn is False:
        if predictor == LEARN:
            exit_with_error("--predictor learn and --no-learn contradict each other: give one of them")
        if folder is not None:
            exit_with_error("--learn-folder has no effect with --no-learn: leave it out")
    if learn and predictor == _NONE:
        exit_with_error(
            "--predictor none and --learn contradict each other: --predictor learn begins without a predictor"
        )


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
