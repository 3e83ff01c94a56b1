"""Output files of a command: whether they can be written is checked before the work begins."""

from pathlib import Path


def check_writable(path: Path) -> None:
    """Raise OSError where no such file could be written; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe or a device: to open it is to use it
    there = path.exists()
    path.open("ab").close()
    if not there:
        path.unlink()


def check_folder(path: Path) -> None:
    """Raise OSError where no file could be written into such a folder; it is made if it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    check_writable(path / ".probe.unfinished")
