"""What processes that have ended had counted, so that no counter of an address goes down when one ends.

Before a process shows its counters, it writes them to a file; the one that starts in its place adds them to its own.
A disk that fails ends that, not the metrics: what a process that ends then had counted is lost.
"""

import contextlib
import logging
from pathlib import Path

from ares.gateway.processes import merged_metrics

logger = logging.getLogger(__name__)


def read(folder: Path, process: int) -> str:
    """Return the counters and histograms that a process has shown, and those of the ones that it replaced."""
    return _read(folder / f"{process}.shown") or _read(folder / f"{process}.ended")


def begin(folder: Path, process: int) -> str:
    """Take over, and return, what the process that was there before has shown, and those that it replaced."""
    with contextlib.suppress(FileNotFoundError):  # it has shown none
        (folder / f"{process}.shown").replace(folder / f"{process}.ended")
    return _read(folder / f"{process}.ended")


def with_ended(folder: Path, process: int, own: str, ended: str) -> str:
    """Return the exposition of a process with the counts of those that it replaced, which may be shown now."""
    text = merged_metrics.merged([own, ended]) if ended else own
    new = folder / f"{process}.new"
    try:
        new.write_text(merged_metrics.merged([text], gauges=False), encoding="utf-8")
        new.replace(folder / f"{process}.shown")
    except OSError as error:
        logger.error("counters are shown that are not kept for the case that this process ends: %s", error)
    return text


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
