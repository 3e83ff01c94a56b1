"""The Python files of a published wheel, read out of it over HTTP without downloading it."""

import functools
import io
import json
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

# Two reads of neighbouring members are one request: the central directory of a large wheel takes a few of these.
_BLOCK = 1 << 20
_TIMEOUT_S = 20.0


class NotReachableError(Exception):
    """The package index, or the wheel on it, cannot be reached; the message says why."""


class _Remote(io.RawIOBase):
    """A file on an HTTP server, read in blocks by range requests."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._at = 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT_S) as reply:  # noqa: S310 - the index's
            self._size = int(reply.headers["Content-Length"])
        self._block = functools.lru_cache(maxsize=64)(self._fetch)

    def _fetch(self, number: int) -> bytes:
        first = number * _BLOCK
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={first}-{first + _BLOCK - 1}"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:  # noqa: S310
            if reply.status != 206:
                raise NotReachableError("the package index does not answer range requests")
            return bytes(reply.read())

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        number, start = divmod(self._at, _BLOCK)
        piece = self._block(number)[start : start + min(len(buffer), self._size - self._at)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def published(requirement: str, folder: Path) -> Callable[[str], str | None]:
    """Return a reader of the files of the wheel that pip would install for this requirement.

    Parameters
    ----------
    folder
        Where pip writes its report.

    Raises
    ------
    NotReachableError
        pip finds no such wheel, or it cannot be read.
    """
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    command += ["--only-binary=:all:", "--retries", "0", "--timeout", str(int(_TIMEOUT_S)), "--report", str(report)]
    try:
        subprocess.run([*command, requirement], check=True, capture_output=True, timeout=60)
        url = json.loads(report.read_text())["install"][0]["download_info"]["url"]
        archive = zipfile.ZipFile(io.BufferedReader(_Remote(url), 1 << 16))
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        why = type(error).__name__
        raise NotReachableError(f"{requirement} cannot be read from the package index: {why}") from None
    members = set(archive.namelist())
    return lambda name: archive.read(name).decode() if name in members else None
