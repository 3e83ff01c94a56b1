"""Checks of the numbered invariants on a finished run (docs/chaos.md lists them)."""

import numpy as np

from ares.simulator.cluster import Outcome
from ares.simulator.state import FINISHED, NONE


def violations(outcome: Outcome, prefill_tokens: int) -> list[str]:
    """Return the violations of a run, one line each; empty where there are none.

    Parameters
    ----------
    outcome
        A run that has ended.
    prefill_tokens
        KV tokens of each prefill instance.
    """
    state, found = outcome.state, []
    work = outcome.workload

    def check(holds: bool, message: str) -> None:
        if not holds:
            found.append(message)

    check(bool((state.status == FINISHED).all()), "I1: a request has not finished")
    check(bool(np.isfinite(state.finish).all()), "I1: a request has no end")
    check(bool((state.first_token > work.arrival_s).all()), "I1: a first token before its request")
    check(bool((state.finish >= state.first_token).all()), "I1: an end before the first token")
    check(
        int(state.batch.sum() + state.prefilling.sum() + state.ready_count.sum()) == 0,
        "I2: a request still runs",
    )
    check(int(state.current.suspended_count) == 0, "I1: a request is still suspended")
    check(bool((state.head == NONE).all()), "I1: a request still waits")
    check(bool((state.unallocated_tokens == 0).all()), "I5: tokens of queued or prefilling requests are left")
    check(int(np.abs(state.phase).sum()) == 0, "I5: the histogram of phases is not empty")
    check(bool((state.resident == 0).all()), f"I5: resident tokens are left: {state.resident}")
    check(bool((state.free == state.total_blocks).all()), f"I5: blocks lost or freed twice: {state.free}")
    check(bool((state.prefill_free == prefill_tokens).all()), "I5: prefill still pins KV, or freed it twice")
    check(int(state.reserved.sum()) == 0, "I5: a reservation was never freed")
    check(bool((state.promised == 0).all()), f"I5: reservations do not add up: {state.promised}")
    check(int(state.current.block_errors) == 0, "I5: a reservation was freed twice")
    check(bool((state.inbound_count == 0).all()), "I5: a transfer never ended")
    return found
