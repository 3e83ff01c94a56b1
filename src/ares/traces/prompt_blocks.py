"""Prompts of traces that name their blocks (`hash_ids`): equal numbers are equal blocks with equal beginnings."""

from dataclasses import dataclass
from pathlib import Path

from ares.traces.readers import FORMATS, guess_format
from ares.traces.records import TraceError, key, open_records

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
    name = guess_format(path)
    if name not in BLOCK_TOKENS:
        raise TraceError(f"{path}: format {name} does not name the blocks of prompts; {', '.join(BLOCK_TOKENS)} do")
    columns, scale = FORMATS[name], 1e-3 if FORMATS[name].unit == "ms" else 1.0
    found = []
    for number, record in open_records(path).rows:
        blocks = record.get("hash_ids")
        try:
            arrival, tokens = float(record[key(columns.arrival)]) * scale, int(record[key(columns.prompt)])
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}:{number}: {error!r}") from None
        if not isinstance(blocks, list) or not all(isinstance(one, int) for one in blocks):
            raise TraceError(f"{path}:{number}: hash_ids are not a list of numbers")
        found.append((arrival, max(tokens, 1), tuple(blocks)))
        if limit is not None and len(found) == limit:
            break
    found.sort(key=lambda one: one[0])
    return [Prompt(arrival - found[0][0], tokens, blocks) for arrival, tokens, blocks in found], BLOCK_TOKENS[name]
