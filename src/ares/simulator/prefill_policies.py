"""The prefill policy of a preset, called in Python at each arrival: where a prompt is computed."""

from collections import Counter, deque

import numpy as np

from ares.policy import Places, Preset, choose_place, prefill_policy
from ares.simulator.block_cache import cached_tokens
from ares.simulator.prefill import CLOSED, queue_at
from ares.simulator.state import BASE_S, IN_PREFILL, PER_PREFILL_S, State


class PrefillChoice:
    """Chooses among the prefill instances with the policy of the live service.

    Decode instances compute no prompts here.
    """

    def __init__(self, preset: Preset, state: State) -> None:
        self._policy, self._state = prefill_policy(preset.prefill, preset.prefill_settings), state
        count = len(state.prefill_free)
        self._names = tuple(f"prefill-{n}" for n in range(count))
        # Blocks that have been sent to each and are not computed yet, with how many prompts have them.
        self._sent: list[Counter[int]] = [Counter() for _ in range(count)]
        self._queues: list[deque[int]] = [deque() for _ in range(count)]

    def place_waiting(self, moment: float) -> None:
        """Place the prompts that have arrived, in order."""
        state = self._state
        count = int(state.current.prefill_waiting)
        state.current.prefill_waiting = 0
        for request in state.prefill_order[:count].tolist():
            tokens = int(state.prompt[request] + state.generated[request])
            places = self._places(request)
            chosen = choose_place(self._policy, places, tokens)
            if chosen is None:
                raise RuntimeError(f"no prefill instance is open at {moment:g} s")
            self._queues[chosen].append(request)
            self._sent[chosen].update(self._blocks(request))
            queue_at(state, request, chosen, max(1, tokens - int(places.cached_tokens[chosen])), moment)

    def _blocks(self, request: int) -> list[int]:
        state = self._state
        if not state.parameters.cached_block_tokens:
            return []
        names: list[int] = state.block_names[state.first_block[request] : state.first_block[request + 1]].tolist()
        return names

    def _forget_computed(self, prefill: int) -> None:
        state, queue = self._state, self._queues[prefill]
        while queue and (state.status[queue[0]] != IN_PREFILL or state.prefill_instance[queue[0]] != prefill):
            self._sent[prefill].subtract(self._blocks(queue.popleft()))

    def _places(self, request: int) -> Places:
        state, count = self._state, len(self._names)
        cached = np.zeros(count, np.int64)
        for prefill in range(count):
            self._forget_computed(prefill)
            if self._policy.sees_prefixes:
                cached[prefill] = self._known(prefill, request)
        none = np.zeros(count)
        return Places(
            instances=self._names,
            open=state.prefill_backlog < CLOSED,
            requests=np.array([len(queue) for queue in self._queues], np.int64),
            decoding=np.zeros(count, np.int64),
            cached_tokens=cached,
            queued_tokens=state.prefill_backlog % CLOSED,
            base_s=state.prefill_step_model[:, BASE_S].copy(),
            token_s=state.prefill_step_model[:, PER_PREFILL_S].copy(),
            decodes=none.astype(np.bool_),
            step_s=none,
            slack_s=none,
        )

    def _known(self, prefill: int, request: int) -> int:
        """Return the tokens of a prompt that an instance has cached, or will have from the prompts before it."""
        state, sent = self._state, self._sent[prefill]
        size = int(state.parameters.cached_block_tokens)
        found = int(cached_tokens(state, len(state.time) + prefill, request))
        if not size:
            return 0
        count = found // size
        most = int(state.prompt[request] + state.generated[request] - 1) // size
        for block in self._blocks(request)[count:most]:
            if sent[block] <= 0:
                break
            count += 1
        return count * size
