"""Readers of recorded traces: Azure CSV, Mooncake JSONL, BurstGPT CSV and plain CSV."""

import csv
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ares.traces.workload import Workload


class TraceError(ValueError):
    """A trace that cannot be read; the message names the file and the line."""


Row = tuple[float, float, float]

# Far beyond any trace, and so small that sums of them stay exact.
_MOST_TOKENS = 1 << 40
_LATEST_S = 1e15


def _timestamp(text: str) -> float:
    """Seconds of an Azure time stamp: seven digits after the point, a zone or none."""
    text = text.strip()
    head, dot, tail = text.partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    fraction = float(f"0.{tail[:digits]}") if dot and digits else 0.0
    moment = datetime.fromisoformat(head + tail[digits:])
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() + fraction


def _azure(record: dict[str, str]) -> Row:
    return _timestamp(record["TIMESTAMP"]), float(record["ContextTokens"]), float(record["GeneratedTokens"])


def _burstgpt(record: dict[str, str]) -> Row:
    return float(record["Timestamp"]), float(record["Request tokens"]), float(record["Response tokens"])


def _plain(record: dict[str, str]) -> Row:
    return float(record["arrival_s"]), float(record["input_tokens"]), float(record["output_tokens"])


def _mooncake(record: dict[str, str]) -> Row:
    return float(record["timestamp"]) / 1000.0, float(record["input_length"]), float(record["output_length"])


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, str]], Row]]] = {
    "azure": (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure),
    "mooncake": (("timestamp", "input_length", "output_length"), _mooncake),
    "burstgpt": (("Timestamp", "Request tokens", "Response tokens"), _burstgpt),
    "csv": (("arrival_s", "input_tokens", "output_tokens"), _plain),
}
"""Every format's needed columns and the reader of one record."""


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise TraceError(f"{path}:{number}: not a JSON object")
            yield number, record


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        try:
            for record in rows:
                yield rows.line_num, record
        except csv.Error as error:
            raise TraceError(f"{path}:{rows.line_num}: not CSV: {error}") from None


def guess_format(path: Path) -> str:
    """Guess the format of a trace from its first line; TraceError names what was found instead."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            head = lines.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if not head:
        raise TraceError(f"{path}: the trace is empty")
    if head.startswith("{"):
        return "mooncake"
    try:
        columns = {name.strip() for name in next(csv.reader([head]))}
    except csv.Error as error:
        raise TraceError(f"{path}:1: not CSV: {error}") from None
    for name, (needed, _) in FORMATS.items():
        if columns >= set(needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    raise TraceError(f"{path}:1: unknown columns {', '.join(sorted(columns))}; known formats: {known}")


def read_trace(path: Path, trace_format: str | None = None) -> Workload:
    """Read a trace.

    Parameters
    ----------
    path
        The file.
    trace_format
        One of `FORMATS`; None guesses it from the first line.

    Returns
    -------
    Workload
        Requests by time of arrival. Requests that generate nothing are left out: no decode instance sees them.

    Raises
    ------
    TraceError
        Naming the file and the line: unreadable, empty, unknown columns, no number, a length or time that cannot be.
    """
    found = guess_format(path) if trace_format is None else trace_format
    if found not in FORMATS:
        raise TraceError(f"{path}: unknown format {found!r}; known: {', '.join(FORMATS)}")
    needed, convert = FORMATS[found]
    rows: list[Row] = []
    try:
        for number, record in _json_lines(path) if found == "mooncake" else _csv_rows(path):
            missing = [name for name in needed if record.get(name) is None]
            if missing:
                raise TraceError(f"{path}:{number}: no column {', '.join(missing)} (format {found})")
            try:
                row = arrival, prompt, output = convert(record)
            except (TypeError, ValueError, OverflowError) as error:
                raise TraceError(f"{path}:{number}: {error}") from None
            if not np.isfinite(row).all() or prompt < 0 or output < 0:
                raise TraceError(f"{path}:{number}: negative or infinite value: {prompt:g} and {output:g} tokens")
            if abs(arrival) > _LATEST_S or max(prompt, output) > _MOST_TOKENS:
                raise TraceError(
                    f"{path}:{number}: beyond all measure: {prompt:g} and {output:g} tokens at {arrival:g} s"
                )
            if output >= 1:
                rows.append((arrival, max(prompt, 1.0), output))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise TraceError(f"{path}: the trace is empty")
    table = np.asarray(rows)
    table = table[np.argsort(table[:, 0], kind="stable")]
    lengths = table[:, 1:].astype(np.int64)
    return Workload(path.name, table[:, 0] - table[0, 0], lengths[:, 0].copy(), lengths[:, 1].copy())
