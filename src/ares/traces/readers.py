"""Readers of recorded traces: Azure CSV, Mooncake and Bailian JSONL, BurstGPT CSV and plain CSV."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ares.traces.records import Record, Records, TraceError, key, open_records
from ares.traces.workload import NO_TEMPLATE, NamedBlocks, Workload

# Above every number of a real trace, and small enough that sums of such numbers stay exact.
_MOST_TOKENS = 1 << 40
_LATEST_S = 1e15

TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
"""Units of a trace's times, and how many of each are a second."""

# Outside of these requests a second, a trace's times are more likely to be in another unit. The published traces have
# between 0.3 and 50; seconds that are taken for milliseconds, or the reverse, are off by a thousand.
_PLAUSIBLE_RPS = (0.01, 100.0)


@dataclass(frozen=True, slots=True)
class Format:
    """The columns of a format, in a table or in JSON objects.

    Attributes
    ----------
    arrival, prompt, output
        Columns of the arrival time and of the lengths.
    unit
        Unit of its times, one of `TIME_UNITS`; None: they are dates.
    markers
        Columns of which one must be present for the format to be guessed: another format has the same three.
    beginnings
        Where its records have ids of the prompt's blocks (`hash_ids`): how many of the first ones may be a template.
    block_tokens
        There: tokens of such a block.
    """

    arrival: str
    prompt: str
    output: str
    unit: str | None
    markers: tuple[str, ...] = ()
    beginnings: tuple[int, ...] = ()
    block_tokens: int = 0

    @property
    def columns(self) -> tuple[str, str, str]:
        """The columns that every record must have."""
        return self.arrival, self.prompt, self.output

    def matches(self, found: Iterable[str]) -> bool:
        """Whether a trace with these columns can be of this format: it has a marker, if there are any."""
        return not self.markers or not {key(name) for name in self.markers}.isdisjoint(map(key, found))

    def missing(self, found: Iterable[str]) -> list[str]:
        """Return the columns that are not among these."""
        there = set(map(key, found))
        return [name for name in self.columns if key(name) not in there]


FORMATS = {
    "azure": Format("TIMESTAMP", "ContextTokens", "GeneratedTokens", None),
    # The usage traces of Qwen on Alibaba Cloud's Bailian: Mooncake's fields, in seconds, and blocks of 16 tokens.
    "bailian": Format(
        "timestamp", "input_length", "output_length", "s", ("chat_id", "parent_chat_id"), (1, 4, 16, 64), 16
    ),
    "mooncake": Format("timestamp", "input_length", "output_length", "ms", beginnings=(1, 2), block_tokens=512),
    "burstgpt": Format("Timestamp", "Request tokens", "Response tokens", "s"),
    "csv": Format("arrival_s", "input_tokens", "output_tokens", "s"),
}


def guess_format(path: Path) -> str:
    """Guess the format of a trace from its first record; TraceError names what was found instead."""
    return format_of(path, open_records(path))


def read_trace(
    path: Path, trace_format: str | None = None, time_unit: str | None = None, *, with_blocks: bool = False
) -> Workload:
    """Read a trace.

    Parameters
    ----------
    path
        The file or pipe; it is read once.
    trace_format
        One of `FORMATS`; None guesses it from the first record.
    time_unit
        One of `TIME_UNITS`; None: the format's.
    with_blocks
        Whether the blocks of the prompts are needed: they take memory.

    Returns
    -------
    Workload
        Requests by time of arrival. Requests that generate nothing are left out: no decode instance sees them. Its
        notes list where it differs from the file.

    Raises
    ------
    TraceError
        The file cannot be read, is empty, or has unknown columns; a value is not a number or out of range; or it does
        not name blocks, and they are needed. The message names the file and the line.
    """
    for given, known, what in ((trace_format, FORMATS, "format"), (time_unit, TIME_UNITS, "time unit")):
        if given is not None and given not in known:
            raise TraceError(f"{path}: unknown {what} {given!r}; known: {', '.join(known)}")
    opened = open_records(path)
    name = trace_format or format_of(path, opened)
    chosen = FORMATS[name]
    if time_unit is not None and chosen.unit is None:
        raise TraceError(f"{path}: the times of format {name} are dates, which have no unit {time_unit}")
    if with_blocks and not chosen.block_tokens:
        named = ", ".join(each for each, one in FORMATS.items() if one.block_tokens)
        raise TraceError(f"{path}: format {name} does not name the blocks of prompts (hash_ids); {named} do")
    per_second = TIME_UNITS[time_unit or chosen.unit or "s"]
    rows: list[tuple[float, float, float]] = []
    templates: list[list[int]] = []
    blocks: list[list[int]] = []
    seen: Counter[str] = Counter()
    seen["bailian"] += name == "mooncake" and time_unit is None and FORMATS["bailian"].matches(opened.columns)
    for number, record in opened.rows:
        where = f"{path}:{number}"
        arrival, prompt, output = read_row(record, name, per_second, where)
        seen["without output"] += output < 1
        if output >= 1:
            seen["without prompt"] += prompt < 1
            seen["out of order"] += bool(rows) and arrival < rows[-1][0]
            rows.append((arrival, max(prompt, 1.0), output))
            templates.append(_templates(record, chosen, where))
            if with_blocks:
                blocks.append(_block_ids(record, where)[: int(prompt) // chosen.block_tokens])
    if not rows:
        empty = "no request generates anything" if seen["without output"] else "the trace is empty"
        raise TraceError(f"{path}: {empty}")
    table = np.asarray(rows)
    order = np.argsort(table[:, 0], kind="stable")
    table = table[order]
    lengths = table[:, 1:].astype(np.int64)
    arrivals = table[:, 0] - table[0, 0]
    begun = np.array(templates, np.int64)[order]
    return Workload(
        path.name,
        arrivals,
        lengths[:, 0].copy(),
        lengths[:, 1].copy(),
        _notes(path, seen),
        begun if (begun != NO_TEMPLATE).any() else None,
        _named_blocks([blocks[index] for index in order.tolist()], chosen.block_tokens) if with_blocks else None,
    )


def _named_blocks(blocks: list[list[int]], tokens: int) -> NamedBlocks:
    """Return the blocks of all prompts, with names from 0 on."""
    first = np.cumsum([0, *(len(one) for one in blocks)])
    _, names = np.unique(np.array(list(itertools.chain.from_iterable(blocks)), np.int64), return_inverse=True)
    return NamedBlocks(tokens, names.astype(np.int64), first)


def _block_ids(record: Record, where: str) -> list[int]:
    """Return the ids of a prompt's blocks; TraceError where they are no list of numbers."""
    blocks = record.get("hash_ids") or []
    if not isinstance(blocks, list) or not all(isinstance(one, int) and abs(one) < _MOST_TOKENS for one in blocks):
        raise TraceError(f"{where}: hash_ids are not a list of numbers")
    return blocks


def _templates(record: Record, chosen: Format, where: str) -> list[int]:
    """Return numbers of a prompt's first blocks; `NO_TEMPLATE` where it is shorter or not known."""
    blocks = _block_ids(record, where) if chosen.beginnings else []
    return [hash(tuple(blocks[:count])) if len(blocks) >= count else NO_TEMPLATE for count in chosen.beginnings]


def rate_warning(work: Workload) -> str | None:
    """Return a sentence where the rate of a recorded trace suggests that its times are in another unit."""
    low, high = _PLAUSIBLE_RPS
    if not math.isfinite(work.rate) or low <= work.rate <= high:
        return None
    return (
        f"{work.name}: {work.rate:,.4g} requests a second is unlikely: if its times are not in the unit that they were "
        f"read in, give --time-unit ({', '.join(TIME_UNITS)})"
    )


def format_of(path: Path, opened: Records) -> str:
    """Guess the format of an open trace from its columns; TraceError names what was found instead."""
    possible = {name: known for name, known in FORMATS.items() if known.matches(opened.columns)}
    name = min(possible, key=lambda one: len(possible[one].missing(opened.columns)))
    missing = possible[name].missing(opened.columns)
    if len(missing) == 1:
        raise TraceError(f"{path}:{opened.line}: no column {missing[0]} (format {name})")
    if missing:
        known = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
        found = ", ".join(sorted(column.strip() for column in opened.columns))
        raise TraceError(f"{path}:{opened.line}: unknown columns {found}; known formats: {known}")
    return name


def read_row(record: Record, name: str, per_second: float, where: str) -> tuple[float, float, float]:
    """Return arrival in seconds, prompt and output tokens of a record in the format `name`.

    Raises
    ------
    TraceError
        One of them is missing, no number, or out of range; the message begins with `where`.
    """
    chosen = FORMATS[name]
    if missing := [column for column in chosen.columns if record.get(key(column)) is None]:
        raise TraceError(f"{where}: no column {', '.join(missing)} (format {name})")
    arrival, *lengths = (record[key(name)] for name in chosen.columns)
    try:
        prompt, output = map(_number, lengths)
        arrival = _date(str(arrival)) if chosen.unit is None else _number(arrival) / per_second
    except (TypeError, ValueError, OverflowError) as error:
        raise TraceError(f"{where}: {error}") from None
    if not all(map(math.isfinite, (arrival, prompt, output))) or prompt < 0 or output < 0:
        raise TraceError(f"{where}: negative or infinite value: {prompt:g} and {output:g} tokens at {arrival:g} s")
    if abs(arrival) > _LATEST_S or max(prompt, output) > _MOST_TOKENS:
        raise TraceError(f"{where}: too large: {prompt:g} and {output:g} tokens at {arrival:g} s")
    if prompt % 1 or output % 1:
        raise TraceError(f"{where}: not whole numbers of tokens: {prompt:g} and {output:g}")
    return arrival, prompt, output


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"not a number: {value}")
    return float(value)


def _date(text: str) -> float:
    """Return the seconds of an Azure time stamp: seven digits after the point, a zone or none."""
    text = text.strip()
    head, dot, tail = text.partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    fraction = float(f"0.{tail[:digits]}") if dot and digits else 0.0
    moment = datetime.fromisoformat(head + tail[digits:])
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() + fraction


def _notes(path: Path, seen: Counter[str]) -> tuple[str, ...]:
    texts = {
        "bailian": "chat_id and parent_chat_id are fields of Bailian's traces, whose times are seconds; its times are "
        "read as milliseconds (--format bailian, or --time-unit ms to be sure)",
        "without output": f"left out {seen['without output']} requests that generate nothing",
        "without prompt": f"{seen['without prompt']} empty prompts count as one token",
        "out of order": f"{seen['out of order']} requests arrive before the one above them; sorted by time",
    }
    return tuple(f"{path.name}: {text}" for what, text in texts.items() if seen[what])
