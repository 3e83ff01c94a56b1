"""What a move costs the client: how long it waits for its next token, in times between two tokens."""

import statistics

from ares.bench.percentiles import milliseconds, percentiles
from ares.check.rows import Outcome, Row
from ares.check.transfers import Move

GROUP = "cost"
# A client notices a pause of this many times between two tokens, where it is also longer than this.
_NOTICED_GAPS, _NOTICED_S = 10.0, 0.25


def rows(moves: list[Move]) -> list[Row]:
    """Return a row for each mode that was used."""
    if not moves:
        return [Row(GROUP, "stall of a move", Outcome.NOT_RUN, "no output was moved")]
    return [_row(mode, [move for move in moves if move.mode == mode]) for mode in sorted({m.mode for m in moves})]


def _row(mode: str, moves: list[Move]) -> Row:
    gaps = percentiles([move.stall_s / move.gap_s for move in moves if move.gap_s > 0], 50, 95)
    stall = milliseconds([move.stall_s for move in moves], 50, 95)
    check = f"stall of a move ({mode})"
    figures = {"moves": len(moves), "stall_ms": stall, "stall_in_gaps": gaps}
    if not gaps:
        return Row(GROUP, check, Outcome.NOT_RUN, "tokens came without gaps", figures=figures)
    value = (
        f"median {gaps['p50']:.1f} gaps ({stall['p50']:.0f} ms), P95 {gaps['p95']:.1f} gaps ({stall['p95']:.0f} ms), "
        f"{len(moves)} moves"
    )
    median_s = statistics.median(move.stall_s for move in moves)
    if gaps["p50"] > _NOTICED_GAPS and median_s > _NOTICED_S:
        advice = "clients notice that: check the transport, then docs/migration.md (what a move costs)"
        return Row(GROUP, check, Outcome.WARN, value, advice, figures)
    return Row(GROUP, check, Outcome.PASS, value, figures=figures)
