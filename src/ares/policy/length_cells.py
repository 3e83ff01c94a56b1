"""The cells of length curves (length_curves.py) by what is known of requests, in bounded memory.

A key stands for something that requests have in common, such as a prompt's first 64 tokens. A key gets a cell with its
second output: most keys are never seen again. The cells that have been without an output for longest are given up.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

from ares.policy import length_curves
from ares.policy.length_curves import ALL

CELLS = 1024
"""Most keys that have a cell; a cell takes 4 KB."""
PREFIXES = (16, 64, 256, 1024)
"""Prompts with so many first tokens in common may have a template in common; a shorter prompt counts whole."""
_SEEN_ONCE = 8192
# Steps of a prompt's length in an octave.
_STEPS = (1, 4)


def request_keys(prompt_tokens: int, templates: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the keys of a request, from the general to the particular.

    They are its prompt's length, each template, and each template together with the length.

    Parameters
    ----------
    prompt_tokens
        The length of its prompt.
    templates
        What else is known of it, as numbers: of its prompt's beginnings (`PREFIXES`), the shortest first.
    """
    octaves = math.log2(max(prompt_tokens, 1))
    sizes = [(step, int(step * octaves)) for step in _STEPS]
    keys = [hash(size) for size in sizes]
    for template in templates:
        keys += [template, *(hash((template, *size)) for size in sizes)]
    return tuple(keys)


class LengthCells:
    """Which cell a request belongs to.

    Parameters
    ----------
    cells
        Most keys that have a cell; more than a request has keys.

    Attributes
    ----------
    lengths
        The outputs of the cells, and in row `ALL` all of them.
    insert
        `length_curves.add`, compiled or plain.
    version
        Rises where a key gets a cell, or loses it.
    """

    def __init__(self, cells: int = CELLS) -> None:
        self.lengths = length_curves.make(cells + 1)
        self.insert = length_curves.add
        self.version = 0
        self._free = list(range(cells, 0, -1))
        # By how long they have been without an output.
        self._cells: OrderedDict[int, int] = OrderedDict()
        # Keys with one output, and that output.
        self._once: OrderedDict[int, tuple[int, bool]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many keys have a cell."""
        return len(self._cells)

    def find(self, keys: Sequence[int]) -> list[int]:
        """Return the cells of those keys that have one, that of all requests first."""
        return [ALL, *(cell for key in keys if (cell := self._cells.get(key)) is not None)]

    def add(self, keys: Sequence[int], tokens: int, was_cut: bool = False) -> None:
        """Add an output to the cells of its keys, and to that of all.

        Parameters
        ----------
        keys
            What is known of its request.
        tokens
            Its length.
        was_cut
            Whether it would have become longer, but for a limit or an end from outside.
        """
        self.insert(self.lengths, ALL, tokens, was_cut)
        for key in keys:
            cell = self._cells.get(key)
            if cell is None:
                first = self._once.pop(key, None)
                if first is None:
                    self._once[key] = (tokens, was_cut)
                    if len(self._once) > _SEEN_ONCE:
                        self._once.popitem(last=False)
                    continue
                cell = self._make(key)
                self.insert(self.lengths, cell, *first)
            self._cells.move_to_end(key)
            self.insert(self.lengths, cell, tokens, was_cut)

    def _make(self, key: int) -> int:
        cell = self._free.pop() if self._free else self._cells.popitem(last=False)[1]
        length_curves.clear(self.lengths, cell)
        self._cells[key] = cell
        self.version += 1
        return cell
