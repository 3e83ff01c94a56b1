"""What the learner has decided so far, in one small file."""

import secrets
import time
from pathlib import Path

import msgspec

from ares.learner.files import write_whole

CURVE = ""
"""The version that stands for no checkpoint: gateways then forecast with their residual-life curve."""


class State(msgspec.Struct, kw_only=True):
    """Champion, challenger, and what has to survive a restart.

    Attributes
    ----------
    name
        The learner's own, by which instances and gateways know it.
    model, hidden_size, every
        What it learns for, and the tokens between two recorded states; empty and 0 until the first recorded states.
    number
        The newest arrival number.
    champion, challenger
        Versions; the champion may be `CURVE`, the challenger None.
    since
        When the champion became it, Unix time: only shown.
    before
        The champions before this one, the newest last.
    decided
        Whether there has been a promotion or demotion; until then the champion is what instances were started with.
    looks
        How many looks at the challenger's trial have been taken.
    trained_through, trained_outputs
        The newest arrival number, and the complete outputs, of the last training; 0 before it.
    trainings
        How many trainings have been started: their seeds.
    train_from
        Outputs that began before this arrival number are not trained on: the last champion failed on what came since.
    frozen
        Whether nothing is trained, promoted or demoted.
    """

    name: str = msgspec.field(default_factory=lambda: f"learner-{secrets.token_hex(4)}")
    model: str = ""
    hidden_size: int = 0
    every: int = 0
    number: int = 0
    champion: str = CURVE
    challenger: str | None = None
    since: float = msgspec.field(default_factory=time.time)
    before: list[str] = []
    decided: bool = False
    looks: int = 0
    trained_through: int = 0
    trained_outputs: int = 0
    trainings: int = 0
    train_from: int = 0
    frozen: bool = False

    def crown(self, version: str) -> None:
        """Make a version the champion; a trial of another challenger begins again, against it."""
        if self.challenger == version:
            self.challenger = None
        self.before = [*self.before[-9:], self.champion]
        self._set(version)

    def fall_back(self, available: set[str]) -> str:
        """Make the champion before this one champion again, or the curve where there is none left; return it."""
        while self.before:
            version = self.before.pop()
            if version != self.champion and (version == CURVE or version in available):
                break
        else:
            version = CURVE
        self._set(version)
        return version

    def _set(self, version: str) -> None:
        self.champion, self.since, self.decided, self.looks = version, time.time(), True, 0


def read(path: Path) -> State | None:
    """Return the state; None where there is none, or it is not readable: then the file is kept under another name."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        aside = path.with_name(f"{path.name}.unreadable-{secrets.token_hex(4)}")
        path.replace(aside)
        return None


def write(path: Path, state: State) -> None:
    """Write the state; OSError where it cannot be written, and then the file before it is still there."""
    write_whole(path, msgspec.json.encode(state))
