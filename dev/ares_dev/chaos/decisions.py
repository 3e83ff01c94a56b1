"""The controller's decisions of a run: made again from their log (I8), and never over a target's memory (I6)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ares.gateway.records.logged_decisions import read_cluster
from ares.gateway.records.replay import replay

_SHOWN = 5


def check_decisions(log: Path) -> tuple[int, list[str]]:
    """Return how many decisions a log has, and what is wrong with them."""
    again = replay(log, None)
    found = [f"I8: {one['logged']} was decided, and now {one['made']}" for one in again.differences[:_SHOWN]]
    with log.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            record = msgspec.json.decode(line)
            if record["kind"] == "moves":
                found += [f"I6: line {number} of the decisions: {what}" for what in overfull(record)]
    return again.decisions, found


def overfull(record: dict[str, Any]) -> Iterator[str]:
    """Yield the moves of a decision that take an instance over its memory, those decided before them counted."""
    cluster = read_cluster(record)
    held = np.bincount(cluster.location, cluster.resident_tokens, len(cluster.instances)) + cluster.promised_tokens
    for move in (*record["oom_actions"], *record["decided"]):
        target, tokens = move["target"], int(cluster.resident_tokens[move["request"]])
        if target < 0:  # suspended
            continue
        held[target] += tokens
        if held[target] > cluster.capacity_tokens[target]:
            yield (
                f"{cluster.requests[move['request']]} ({tokens} tokens) makes {held[target]:.0f} of "
                f"{cluster.capacity_tokens[target]} on {cluster.instances[target]}"
            )
