"""Writing the learner's files: whole or not at all, and still there after a power failure."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it; OSError where it cannot be written, and then nothing has changed."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or the names of a folder's files; OSError where it cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Delete what a process that was killed left half written."""
    for path in folder.glob(".*.unfinished"):
        path.unlink(missing_ok=True)
