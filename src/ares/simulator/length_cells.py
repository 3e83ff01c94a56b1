"""The length cells of a workload's requests: those that a gateway would find (policy/length_cells.py), known ahead."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ares.policy.length_cells import request_keys
from ares.simulator.state import NONE
from ares.traces.workload import NO_TEMPLATE, Workload

# Keys of a workload that get a cell, the most frequent first: more than a gateway has, since it gives up those without
# an output for long, and here none is; 64 MB.
_CELLS = 16_384


@dataclass(frozen=True, slots=True)
class CellsOfRequests:
    """The cells of R requests.

    Attributes
    ----------
    cells
        How many there are, that of all requests included.
    of_chain
        The cells of each chain, from the general to the particular, NONE behind the last, shape (N, K).
    chain
        The chain of each request, shape (R,).
    """

    cells: int
    of_chain: NDArray[np.int64]
    chain: NDArray[np.int64]


def cells_of(work: Workload) -> CellsOfRequests:
    """Return the cells of a workload's requests, by the lengths of their prompts and their templates."""
    templates = np.empty((len(work), 0), np.int64) if work.templates is None else work.templates
    keys = [
        request_keys(int(tokens), [int(one) for one in row if one != NO_TEMPLATE])
        for tokens, row in zip(work.prompt_tokens, templates, strict=True)
    ]
    counts = Counter(key for row in keys for key in row)
    # A key that comes once never gets a cell.
    frequent = [key for key, count in counts.most_common(_CELLS) if count > 1]
    cell = {key: number for number, key in enumerate(frequent, 1)}
    rows = [tuple(cell[key] for key in row if key in cell) for row in keys]
    chains = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    of_chain = np.full((len(chains), max(map(len, chains))), NONE, np.int64)
    for row, number in chains.items():
        of_chain[number, : len(row)] = row
    return CellsOfRequests(len(frequent) + 1, of_chain, np.array([chains[row] for row in rows], np.int64))
