"""Commands of the operator: a running learner takes them within seconds, without one they are carried out at once."""

import contextlib
import json
import time
import uuid

import msgspec

from ares.learner.errors import LearnerError
from ares.learner.files import write_whole
from ares.learner.folder import Folder, LockedError
from ares.learner.learning import Learning
from ares.learner.settings import LearnerSettings

_TAKEN_S = 30.0
_POLL_S = 0.1


class Command(msgspec.Struct, kw_only=True):
    """A command: ``rollback`` (with a version, or empty), ``freeze`` or ``unfreeze``."""

    command: str
    version: str = ""


def carry_out(folder: Folder, command: Command, timeout_s: float = _TAKEN_S) -> str:
    """Let a running learner carry out a command, or do it here where none runs; return what was done, as a sentence.

    Raises
    ------
    LearnerError
        It was refused, or the running learner has not taken it in time.
    """
    if not folder.exists():
        raise LearnerError(f"{folder.path}: no learner has worked here (ares predictor learn --folder {folder.path})")
    file = folder.commands / f"{uuid.uuid4().hex}.json"
    answer = file.with_suffix(".answer")
    try:
        folder.commands.mkdir(exist_ok=True)
        write_whole(file, msgspec.json.encode(command))
    except OSError as error:
        raise LearnerError(f"{folder.commands}: cannot be written: {error.strerror}") from error
    until = time.monotonic() + timeout_s
    try:
        while not answer.exists():
            with contextlib.suppress(LockedError), folder.locked():
                # Not from the environment, in which nothing concerns a command: nobody is asked, nothing is trained.
                settings = LearnerSettings.model_construct(folder=folder.path)
                learning = Learning(folder, settings, {}, read_recorded=False)
                take(learning)
                learning.save()
            if time.monotonic() > until:
                raise LearnerError(f"{folder.holder() or 'the learner'} has not answered; is it stopped or overloaded?")
            time.sleep(_POLL_S)
        read = json.loads(answer.read_bytes())
    finally:
        file.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
    if "error" in read:
        raise LearnerError(read["error"])
    return str(read["done"])


def take(learning: Learning) -> int:
    """Carry out the commands that wait in the folder, and answer them; return how many there were."""
    taken = 0
    for file in sorted(learning.folder.commands.glob("*.json")):
        try:
            answer = {"done": _done(learning, msgspec.json.decode(file.read_bytes(), type=Command))}
        except LearnerError as error:
            answer = {"error": str(error)}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            answer = {"error": f"not a command: {error}"}
        taken += 1
        file.unlink(missing_ok=True)
        # An answer that finds no room: the command has been carried out, and its sender stops waiting.
        with contextlib.suppress(OSError):
            write_whole(file.with_suffix(".answer"), json.dumps(answer).encode())
    return taken


def _done(learning: Learning, command: Command) -> str:
    match command.command:
        case "rollback":
            return learning.rollback(command.version)
        case "freeze" | "unfreeze":
            return learning.freeze(frozen=command.command == "freeze")
    raise LearnerError(f"unknown command {command.command!r}")
