"""The running sums of what waits, against a count over all that wait."""

import random
from typing import cast

from ares.gateway.control.backlog import Backlog
from ares.gateway.openai.sampling import Sampling
from ares.gateway.session.placement import Entering, Phase, Placement

PHASES: tuple[Phase, ...] = ("prefill", "waiting", "starting", "decode", "suspended")


def test_the_sums_are_those_of_the_sequences_that_wait() -> None:
    dice = random.Random(0)
    left: dict[str, float] = {}
    backlog = Backlog(lambda sequence: left[sequence.id])
    sequences = {
        name: Entering(name, [1] * dice.randint(1, 50), Sampling({}, 100), cast(Placement, None), 1.0)
        for name in map(str, range(20))
    }
    counted: dict[str, int] = {}
    for _ in range(2000):
        one = dice.choice(list(sequences.values()))
        left[one.id] = dice.uniform(1, 100)
        one.emitted.append(1)
        if dice.random() < 0.1:
            backlog.remove(one)
            counted.pop(one.id, None)
        else:
            one.phase, one._decoding = dice.choice(PHASES), dice.random() < 0.5
            backlog.update(one)
            counted.pop(one.id, None)
            if one.phase != "decode" or not one._decoding:
                # By what was known when its phase was told; what comes later changes nothing.
                counted[one.id] = one.tokens + round(left[one.id])
        assert (len(backlog), backlog.tokens) == (len(counted), sum(counted.values()))
