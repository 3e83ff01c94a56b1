"""`most_saved`: the requests whose loss would cost the most get a copy where they would resume.

What a copy saves is the recomputation of the tokens that it adds, for as long as the request runs: its seconds by the
fitted cost of a prompt's token, times the tokens that the request is expected to generate. A first copy and the blocks
since the last one compete by the same measure, for one budget of the link.

A copy goes where the request has one already; else where most of it is cached anyway, as after a move; else to the
instance with the most free memory by forecast, copies counted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ares.policy.cluster import BoolArray, Cluster, FloatArray, IntArray
from ares.policy.copies.base import Copies, Copyable, CopyDecision, register
from ares.policy.forecast import forecast, geometric_grid
from ares.policy.settings import in_range

_GRID = geometric_grid(2_000, 16)


@dataclass(frozen=True, slots=True)
class MostSavedSettings:
    """Settings.

    Attributes
    ----------
    link_bytes_s
        Bytes per second that all copies together may transfer, in the mean; 0: nothing is copied.
    memory_share
        Share of an instance's KV that copies may fill there; 0: nothing is copied. They are evicted where the memory is
        wanted.
    least_saved_s
        Seconds of recomputation that a copy must save: it adds so many tokens.
    least_remaining_tokens
        A request that is expected to generate fewer is not copied.
    at_once
        Most copies to one instance at a time.
    """

    link_bytes_s: float = 0.0
    memory_share: float = 0.25
    least_saved_s: float = 0.02
    least_remaining_tokens: float = 32.0
    at_once: int = 8

    def __post_init__(self) -> None:
        in_range(self, link_bytes_s=1e15, memory_share=1.0)


@register("most_saved")
class MostSaved(Copies):
    """The most seconds of recomputation saved, within the budgets."""

    Settings = MostSavedSettings
    settings: MostSavedSettings

    @classmethod
    def copies(cls, settings: Any) -> bool:
        """Return whether there is a budget."""
        return bool(settings.link_bytes_s > 0 and settings.memory_share > 0 and settings.at_once > 0)

    def decide(self, cluster: Cluster, copyable: Copyable) -> list[CopyDecision]:
        """Return the copies of this period, the most valuable first."""
        if copyable.link_bytes <= 0 or not copyable.requests.any() or not copyable.takes.any():
            return []
        remaining = _median_remaining(cluster)
        size = cluster.block_tokens
        # The newest token has no KV yet.
        full = np.maximum(cluster.resident_tokens - 1, 0) // size * size
        room, peak = self._room(cluster, copyable)
        left, under_way = copyable.link_bytes, copyable.under_way.copy()
        worth = copyable.requests & (remaining >= self.settings.least_remaining_tokens)
        order = np.argsort(-_value(cluster, copyable, full, remaining), kind="stable")
        made: list[CopyDecision] = []
        for row in order[worth[order]].tolist():
            if left <= 0:
                break
            target = self._target(row, int(full[row]), cluster, copyable, room, peak)
            if target is None or under_way[target] >= self.settings.at_once:
                continue
            new = int(full[row] - min(copyable.cached_tokens[row, target], full[row]))
            saved_s = new * copyable.token_s
            if not new or saved_s < self.settings.least_saved_s:
                continue
            made.append(
                CopyDecision(row, target, new, f"saves {saved_s:.2g} s of recomputation, {remaining[row]:.0f} to come")
            )
            left -= new * copyable.token_bytes
            room[target] -= new if copyable.copied_to[row] == target else full[row]
            under_way[target] += 1
        return made

    def _room(self, cluster: Cluster, copyable: Copyable) -> tuple[FloatArray, FloatArray]:
        """Return the tokens of copies that each instance still takes, and its peak of memory, shape (I,) each."""
        capacity = cluster.capacity_tokens.astype(np.float64)
        peak: FloatArray = forecast(cluster, _GRID).high(1.0).max(axis=1)
        held = copyable.under_way_tokens.astype(np.float64)
        rows = np.flatnonzero((copyable.copied_to >= 0) & (copyable.copied_to != cluster.location))
        np.add.at(held, copyable.copied_to[rows], copyable.cached_tokens[rows, copyable.copied_to[rows]])
        share = self.settings.memory_share / copyable.processes
        room = np.minimum(share * capacity, capacity - peak) - held
        return room, peak

    def _target(
        self, row: int, full: int, cluster: Cluster, copyable: Copyable, room: FloatArray, peak: FloatArray
    ) -> int | None:
        """Return where the copy of a request goes; None where no instance has room for it."""
        location, cached = int(cluster.location[row]), copyable.cached_tokens[row]
        able: BoolArray = copyable.takes & (np.arange(len(room)) != location)
        last = int(copyable.copied_to[row])
        if last >= 0 and able[last] and cached[last] and room[last] >= full - cached[last]:
            return last
        able &= room >= full
        if not able.any():
            return None
        # Less than half, such as a shared system prompt, would bring all to one instance.
        most: IntArray = np.where(able & (2 * cached >= full), cached, 0)
        if most.any():
            return int(most.argmax())
        free = (room - peak) / np.maximum(cluster.capacity_tokens, 1)
        return int(np.where(able, free, -np.inf).argmax())


def _median_remaining(cluster: Cluster) -> FloatArray:
    """Return the median of what each request will still generate, shape (R,); the horizon where it is unknown."""
    rows = len(cluster.location)
    if cluster.remaining_tokens is None:
        return np.full(rows, float(_GRID[-1]))
    middle = cluster.remaining_tokens[:, int(np.argmin(np.abs(np.array(cluster.levels) - 0.5)))]
    known: FloatArray = np.where(np.isnan(middle), float(_GRID[-1]), middle)
    return np.minimum(known, float(_GRID[-1]))


def _value(cluster: Cluster, copyable: Copyable, full: IntArray, remaining: FloatArray) -> FloatArray:
    """Return what a copy of each request would save where most of it is cached already, shape (R,)."""
    rows = np.arange(len(full))
    elsewhere = copyable.cached_tokens * copyable.takes
    elsewhere[rows, cluster.location] = 0
    there = np.minimum(elsewhere.max(axis=1, initial=0), full)
    value: FloatArray = (full - there) * copyable.token_s * remaining
    return value
