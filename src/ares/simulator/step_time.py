"""How long a decode step takes, and how far an instance gets in a time: in closed form, without a loop over tokens.

A step over b requests attending to N tokens takes base + per_request b + per_resident_token N. With the batch
unchanged N grows by b a step, so k steps take k (base + per_request b + per_resident N) + per_resident b k (k - 1) / 2.
"""

import math

from ares.simulator.heaps import compiled, inlined
from ares.simulator.state import BASE_S, PER_REQUEST_S, PER_RESIDENT_S, State


@inlined
def steps_time(state: State, instance: int, steps: int) -> float:
    """Return the seconds that the next `steps` pure decode steps of an instance take."""
    model = state.step_model[instance]
    batch = state.batch[instance]
    first = model[BASE_S] + model[PER_REQUEST_S] * batch + model[PER_RESIDENT_S] * state.resident[instance]
    return float(steps * first + model[PER_RESIDENT_S] * batch * (steps * (steps - 1) / 2.0))


@compiled
def steps_by(state: State, instance: int, moment: float) -> int:
    """Return how many of the planned steps are done by `moment`, at most all of them."""
    elapsed = moment - state.time[instance]
    planned = state.planned[instance]
    if elapsed <= 0.0 or planned <= 1:
        done = 0
        if (
            planned == 1
            and elapsed > 0.0
            and state.prefilling[instance] == 0
            and steps_time(state, instance, 1) <= elapsed
        ):
            done = 1
        return int(done)
    model = state.step_model[instance]
    batch = state.batch[instance]
    first = model[BASE_S] + model[PER_REQUEST_S] * batch + model[PER_RESIDENT_S] * state.resident[instance]
    curve = model[PER_RESIDENT_S] * batch / 2.0
    # elapsed = first k + curve k (k - 1)
    linear = first - curve
    guess = (
        elapsed / first
        if curve <= 0.0
        else 2.0 * elapsed / (linear + math.sqrt(linear * linear + 4.0 * curve * elapsed))
    )
    done = min(int(guess), planned)
    while done < planned and steps_time(state, instance, done + 1) <= elapsed:
        done += 1
    while done > 0 and steps_time(state, instance, done) > elapsed:
        done -= 1
    return int(done)
