"""The loss of a decode instance: every request on it resumes elsewhere from its tokens (invariant I1)."""

import numpy as np

from ares.simulator.blocks import leave_slot
from ares.simulator.compiled import tree_set
from ares.simulator.decisions import enter
from ares.simulator.instance import settle
from ares.simulator.queues import take_first
from ares.simulator.state import FINISHED, NOBODY, State


def fail_instance(state: State, instance: int, moment: float) -> None:
    """Close an instance and send its running and waiting requests to the least loaded of the others.

    Raises
    ------
    ValueError
        Where no other instance is left.
    """
    others = [index for index in range(len(state.time)) if index != instance and not state.closed[index]]
    if not others:
        raise ValueError(f"failure of decode instance {instance}: no other instance is left")
    settle(state, instance, moment)
    state.closed[instance] = 1
    lost: list[int] = []
    while state.batch[instance] > 0:
        lost.append(int(leave_slot(state, instance, 0)))
    for index in range(int(state.prefilling[instance])):
        request = int(state.prefilling_list[instance, index])
        state.waiting_tokens[instance] -= state.prompt[request] + state.generated[request]
        lost.append(request)
    state.prefilling[instance] = 0
    while state.head[instance] != NOBODY:
        lost.append(int(take_first(state, instance)))
    state.planned[instance] = 0
    tree_set(state.tree, instance, np.inf)
    for request in sorted(lost):
        if state.status[request] == FINISHED:
            continue
        state.moving[request] = 0
        state.blocks[request] = 0
        state.computed[request] = 0
        target = min(others, key=lambda index: (int(state.batch[index] + state.waiting_count[index]), index))
        enter(state, request, target, moment)
