"""The records of a trace file: JSON objects, one per line, or the rows of a table with a header.

A table's fields are separated by the comma, semicolon, tab or bar that is most frequent in its header. Names of columns
are compared without regard to case and surrounding spaces.
"""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares.text_files import TextFileError, read_lines


class TraceError(ValueError):
    """A trace that cannot be read; the message names the file and the line."""


Record = dict[str, Any]

_SEPARATORS = ",;\t|"


def key(name: str) -> str:
    """Return a column's name as in a `Record`: lower case, without surrounding spaces."""
    return name.strip().casefold()


@dataclass(frozen=True, slots=True)
class Records:
    """An open trace file.

    Attributes
    ----------
    line
        Number of the line with the columns.
    columns
        Names in the header, or the fields of the first object.
    rows
        Line number and record of each line that is not empty.
    """

    line: int
    columns: Sequence[str]
    rows: Iterator[tuple[int, Record]]


def open_records(path: Path) -> Records:
    """Open a trace and read its columns; the file is opened once, so that it may be a pipe.

    Raises
    ------
    TraceError
        It cannot be read, is empty, or a line is malformed. Also raised while `rows` is read.
    """
    lines = enumerate(_text(path), start=1)
    number, head = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    match head.lstrip()[:1]:
        case "":
            raise TraceError(f"{path}: the trace is empty")
        case "[":
            raise TraceError(f"{path}:{number}: a JSON array: write one object a line, jq -c '.[]' FILE > TRACE")
        case "{":
            first = _object(path, number, head)
            rest = ((n, _object(path, n, line)) for n, line in lines if line.strip())
            return Records(number, list(first), itertools.chain([(number, first)], rest))
    try:
        separator, names = max(((one, _fields(head, one)) for one in _SEPARATORS), key=lambda found: len(found[1]))
    except csv.Error as error:
        raise TraceError(f"{path}:{number}: not CSV: {error}") from None
    if twice := _repeated(names):
        raise TraceError(f"{path}:{number}: the column {twice} is repeated")
    return Records(number, names, _rows(path, separator, number, names, lines))


def _text(path: Path) -> Iterator[str]:
    try:
        yield from read_lines(path)
    except TextFileError as error:
        raise TraceError(str(error)) from None


def _object(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise TraceError(f"{path}:{number}: not a JSON object")
    return record


def _once(pairs: list[tuple[str, Any]]) -> Record:
    record = {key(name): value for name, value in pairs}
    if len(record) < len(pairs):
        raise ValueError(f"{_repeated(name for name, _ in pairs)} is repeated")
    return record


def _repeated(names: Iterable[str]) -> str:
    """Return the first name that occurs more than once; empty where none does."""
    counts = Counter(key(name) for name in names if name.strip())
    return next((name for name, count in counts.items() if count > 1), "")


# A quote that is never closed would swallow the rest of the file.
_DIALECT: dict[str, Any] = {"strict": True, "skipinitialspace": True}


def _fields(head: str, separator: str) -> list[str]:
    return next(csv.reader([head], delimiter=separator, **_DIALECT))


def _rows(
    path: Path, separator: str, header: int, names: Sequence[str], lines: Iterable[tuple[int, str]]
) -> Iterator[tuple[int, Record]]:
    rows = csv.reader((line + "\n" for _, line in lines), delimiter=separator, **_DIALECT)
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            number = header + rows.line_num
            if any(cell.strip() for cell in row[len(names) :]):
                raise TraceError(f"{path}:{number}: {len(row)} fields where the header has {len(names)}")
            yield number, {key(name): cell for name, cell in zip(names, row, strict=False)}
    except csv.Error as error:
        raise TraceError(f"{path}:{header + rows.line_num}: not CSV: {error}") from None
