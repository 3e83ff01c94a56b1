"""The cache of models on disk: a folder with the final name is complete, and a list of checksums proves it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

_CHECKSUMS = "checksums.json"


class ModelError(RuntimeError):
    """The model is not available; the message says what to do."""


def verify(path: Path) -> None:
    """Hash every file of a cached model.

    Parameters
    ----------
    path
        A folder of the cache, as `resolve` returned it.

    Raises
    ------
    ModelError
        A file is missing or changed (the message names it), or the folder is not one of the cache's.
    """
    files = _listed_files(path)
    if files is None:
        raise ModelError(f"{path} has no readable {_CHECKSUMS}, so it cannot be verified. Delete it and start again.")
    for name, listed in files.items():
        try:
            whole = _sha256(path / name) == listed["sha256"]
        except OSError:
            whole = False
        if not whole:
            raise ModelError(f"{path / name} is missing or damaged. Delete the folder {path} and start again.")


def cache_folder() -> Path:
    """Return the cache of this user: `$ARES_CACHE`, `$XDG_CACHE_HOME/ares` or `~/.cache/ares`."""
    if own := os.environ.get("ARES_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ares"
    return Path.home() / ".cache" / "ares"


def _listed_files(folder: Path) -> dict[str, dict[str, Any]] | None:
    try:
        files = json.loads((folder / _CHECKSUMS).read_bytes())["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return files if isinstance(files, dict) else None


def is_complete(folder: Path) -> bool:
    """Return whether every listed file is present with its size: cheap enough for every start."""
    files = _listed_files(folder)
    if not files:
        return False
    try:
        return all((folder / name).stat().st_size == listed["bytes"] for name, listed in files.items())
    except (OSError, LookupError, TypeError):
        return False


@contextmanager
def locked(folder: Path, console: Console) -> Iterator[None]:
    """Hold the lock on a folder of the cache; wait for another process that prepares the same model."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(console, "Another process is preparing this model; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def report(console: Console, message: str) -> None:
    """Print one line of progress."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def staging_folder(folder: Path, label: str) -> Path:
    """Return the hidden folder in which this folder of the cache is prepared."""
    # "~" is in no id, so no other model's folders match a pattern made of this.
    return folder.with_name(f".{folder.name}~{label}")


def publish(staging: Path, folder: Path, source: str, expected: Mapping[str, str] | None = None) -> None:
    """List the files of a finished folder in its checksums, and give it its final name.

    Parameters
    ----------
    staging
        The finished folder, which is renamed.
    folder
        Its final name; what is there is replaced.
    source
        Where the files come from, for the list.
    expected
        The sha256 of files, where their source publishes it.

    Raises
    ------
    ModelError
        A file has another sha256 than expected.
    """
    files = {}
    (staging / _CHECKSUMS).unlink(missing_ok=True)  # of a process killed before it renamed the folder
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        name = path.relative_to(staging).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        if expected and expected.get(name, files[name]["sha256"]) != files[name]["sha256"]:
            path.unlink()  # the next attempt fetches this one again and keeps the others
            raise ModelError(f"{name} arrived damaged. Start again to fetch it once more.")
    (staging / _CHECKSUMS).write_text(json.dumps({"source": source, "files": files}, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    for leftover in folder.parent.glob(staging_folder(folder, "*").name):
        shutil.rmtree(leftover, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
