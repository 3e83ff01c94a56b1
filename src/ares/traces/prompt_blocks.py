"""Prompts of traces that name their blocks (`hash_ids`): equal numbers are equal blocks with equal beginnings."""

from dataclasses import dataclass
from pathlib import Path

from ares.traces.readers import FORMATS, TIME_UNITS, format_of, read_row
from ares.traces.records import TraceError, open_records

# Tokens of a block, by format.
BLOCK_TOKENS = {"mooncake": 512, "bailian": 16}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its arrival in seconds from the first one, its tokens, and its blocks, the last one perhaps partial."""

    arrival_s: float
    tokens: int
    blocks: tuple[int, ...]


def read_prompts(path: Path, limit: int | None = None) -> tuple[list[Prompt], int]:
    """Return the prompts of a trace by arrival, at most so many, and the tokens of a block.

    Raises
    ------
    TraceError
        The trace cannot be read, or does not name the blocks of its prompts.
    """
    opened = open_records(path)
    name = format_of(path, opened)
    if name not in BLOCK_TOKENS:
        raise TraceError(f"{path}: format {name} does not name the blocks of prompts; {', '.join(BLOCK_TOKENS)} do")
    per_second = TIME_UNITS[FORMATS[name].unit or "s"]
    found = []
    for number, record in opened.rows:
        blocks = record.get("hash_ids")
        arrival, tokens, _ = read_row(record, name, per_second, f"{path}:{number}")
        if not isinstance(blocks, list) or not all(isinstance(one, int) for one in blocks):
            raise TraceError(f"{path}:{number}: hash_ids are not a list of numbers")
        found.append((arrival, max(int(tokens), 1), tuple(blocks)))
        if limit is not None and len(found) == limit:
            break
    found.sort(key=lambda one: one[0])
    return [Prompt(arrival - found[0][0], tokens, blocks) for arrival, tokens, blocks in found], BLOCK_TOKENS[name]
