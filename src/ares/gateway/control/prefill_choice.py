"""Where a prompt is computed: what the prefill policy is asked, and what follows from its answer."""

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from ares.gateway.control.decider import Decider
from ares.gateway.control.prefill_queue import PrefillQueue
from ares.gateway.pool.instance import Instance
from ares.gateway.session.placement import Placement
from ares.policy import Places, Prefill, choose_place
from ares.policy.cluster import IntArray
from ares.policy.cost_model import default_tpot_s
from ares.policy.prefill.least_time import LeastTime

# Seconds of a prompt's token, until an instance has computed some prompts.
_TOKEN_BEFORE_FIT_S = 1e-4


class Log(Protocol):
    """Logs choices (`DecisionLog.prefill`)."""

    def __call__(
        self,
        policy: Prefill,
        memory: dict[str, float],
        places: Places,
        tokens: int,
        chosen: int | None,
        *,
        resumes: bool = False,
    ) -> None:
        """Log one: the policy, its memory before it, its arguments, the index of the place, and whether it resumes."""
        ...


Queues = MutableMapping[Instance, PrefillQueue]


class PrefillChoice:
    """Asks one prefill policy.

    Parameters
    ----------
    policy
        The policy.
    tpot_s
        Objective of the time per token; None: by the instance's steps.
    queues
        What each instance has to compute, and how fast it does; kept from one policy to the next.
    sees_prefixes
        Whether this policy, the one of dispatch, or warm copies need to know what is cached.
    log
        Called with each choice.

    Attributes
    ----------
    decider
        Counts the faults of the policy.
    """

    def __init__(
        self,
        policy: Prefill,
        tpot_s: float | None,
        queues: Queues,
        *,
        sees_prefixes: bool,
        log: Log = lambda *_, **__: None,
    ) -> None:
        self.decider: Decider[Prefill, int | None] = Decider(policy, choose_place)
        self._policy = policy
        self._tpot_s = tpot_s
        self._queues = queues
        self._sees_prefixes = sees_prefixes
        self._log = log
        self._resuming = LeastTime()

    def choose(
        self, placement: Placement, prefilling: list[Instance], decoding: list[Instance]
    ) -> tuple[Instance, bool]:
        """Return the instance that computes a prompt, and whether it is one of `decoding`, which may be empty.

        Raises
        ------
        DecisionError
            The policy failed.
        """
        tokens = placement.tokens
        if not self._policy.sees_prefixes:
            chosen = prefilling[self._ask(self._policy, self._by_requests(prefilling), tokens)]
            uncached = tokens
            if self._sees_prefixes:
                uncached = max(1, tokens - int(cached_tokens(placement, [chosen])[0]))
                self.note_sent(placement, chosen)
            self._queue(chosen).begin(id(placement), uncached)
            return chosen, False
        instances = [*prefilling, *decoding]
        places = self._places(placement, instances, len(prefilling))
        index = self._ask(self._policy, places, tokens)
        chosen = instances[index]
        self._begin(placement, chosen, places, index)
        self.note_sent(placement, chosen)
        return chosen, index >= len(prefilling)

    def choose_without_policy(self, placement: Placement, prefilling: list[Instance]) -> Instance:
        """Return the instance with the fewest requests, for when the policy has failed."""
        chosen = min(prefilling, key=lambda instance: self._queued(instance)[0] + _decoding(instance))
        self._queue(chosen).begin(id(placement), placement.tokens)
        return chosen

    def _ask(self, policy: Prefill, places: Places, tokens: int, *, resumes: bool = False) -> int:
        """Return the index of the place that a policy chooses: one is open."""
        memory = policy.memory()
        index = choose_place(policy, places, tokens)
        self._log(policy, memory, places, tokens, index, resumes=resumes)
        return index or 0

    def choose_resumption(
        self, placement: Placement, prefilling: list[Instance], decoding: list[Instance], *, begins: bool
    ) -> Instance | None:
        """Return the decode instance that computes the rest of a request which resumes, most of it being cached there.

        None where no instance has anything cached, or a prefill instance takes less time. The rest may lengthen a step
        by more than the objective: the stream waits already, and what the others lose counts.

        Parameters
        ----------
        placement, prefilling, decoding
            The request, and the instances that can compute it.
        begins
            Whether it is computed at once where this says.
        """
        instances = [*prefilling, *decoding]
        places = self._places(placement, instances, len(prefilling))
        if not places.cached_tokens[len(prefilling) :].any():
            return None
        none = np.zeros(len(instances))
        places = replace(places, base_s=none, token_s=none + self.token_s, slack_s=none + np.inf)
        index = self._ask(self._resuming, places, placement.tokens, resumes=True)
        if not places.decodes[index] or not places.cached_tokens[index]:
            return None
        chosen = instances[index]
        if begins:
            self._begin(placement, chosen, places, index)
        return chosen

    def _begin(self, placement: Placement, chosen: Instance, places: Places, index: int) -> None:
        """Count what an instance, the place at an index, is to compute of a request as queued there."""
        uncached = max(1, placement.tokens - int(places.cached_tokens[index]))
        takes_s = (uncached + int(places.queued_tokens[index])) * places.token_s[index] + places.step_s[index]
        queue = self._queue(chosen)
        # The end of a prompt on a decode instance is not reported.
        queue.begin(id(placement), uncached, float(takes_s) if places.decodes[index] else None)
        if places.decodes[index]:
            queue.place(placement.tokens)

    @property
    def token_s(self) -> float:
        """Seconds to compute a prompt's token, in the mean of the instances that have computed some."""
        times = (instance.state.prefill_time.mean_token_s for instance in self._queues)
        known = [one for one in times if one is not None]
        return float(np.mean(known)) if known else _TOKEN_BEFORE_FIT_S

    def ended(self, placement: Placement, instance: Instance) -> None:
        """Note that a prefill instance has answered, or has failed to."""
        queue = self._queues.get(instance)  # there is one, too, if another policy has chosen the instance
        if queue is not None:
            queue.end(id(placement))

    def queued_s(self, instance: Instance) -> float:
        """Return the seconds that an instance will take for the prompts that it has."""
        base_s, token_s = instance.state.prefill_time.coefficients or (0.0, self.token_s)
        prompts, tokens = self._queued(instance)
        return base_s * prompts + token_s * tokens

    def note_sent(self, placement: Placement, instance: Instance) -> None:
        """Note that an instance has, or will soon have, the KV of all tokens so far."""
        if self._sees_prefixes:
            cached = instance.state.cached
            cached.sent(placement.block_hashes(cached.block_size))

    def _queue(self, instance: Instance) -> PrefillQueue:
        return self._queues.setdefault(instance, PrefillQueue())

    def _places(self, placement: Placement, instances: Sequence[Instance], prefilling: int) -> Places:
        queued = [self._queued(instance) for instance in instances]
        times = [instance.state.prefill_time.coefficients for instance in instances]
        known = [one for one in times if one is not None] or [(0.0, self.token_s)]
        # An instance that has not computed any prompt counts as the mean of the others.
        usual = np.mean(known, axis=0)
        fitted = np.array([usual if one is None else one for one in times])
        decodes = np.arange(len(instances)) >= prefilling
        steps = [_step_s(i) if d else 0.0 for i, d in zip(instances, decodes, strict=True)]
        slack = [self._slack_s(i, s) if d else 0.0 for i, s, d in zip(instances, steps, decodes, strict=True)]
        return Places(
            instances=tuple(i.name for i in instances),
            open=np.ones(len(instances), dtype=np.bool_),
            requests=np.array([prompts for prompts, _ in queued], dtype=np.int64),
            decoding=np.array([_decoding(i) for i in instances], dtype=np.int64),
            cached_tokens=cached_tokens(placement, instances),
            queued_tokens=np.array([tokens for _, tokens in queued], dtype=np.int64),
            base_s=fitted[:, 0],
            token_s=fitted[:, 1],
            decodes=decodes,
            step_s=np.array(steps),
            slack_s=np.array(slack),
            transfer_s=_transfer_s(instances[prefilling:]),
        )

    def _by_requests(self, instances: list[Instance]) -> Places:
        """Return places for a policy that sees no more than the number of requests."""
        none = np.zeros(len(instances))
        return Places(
            instances=tuple(i.name for i in instances),
            open=np.ones(len(instances), dtype=np.bool_),
            requests=np.array([self._queued(i)[0] for i in instances], dtype=np.int64),
            decoding=np.array([_decoding(i) for i in instances], dtype=np.int64),
            cached_tokens=none.astype(np.int64),
            queued_tokens=none.astype(np.int64),
            base_s=none,
            token_s=none,
            decodes=none.astype(np.bool_),
            step_s=none,
            slack_s=none,
        )

    def _queued(self, instance: Instance) -> tuple[int, int]:
        """Return how many prompts an instance still has to compute, and about how many of their tokens.

        As it reported, and those that were sent since then; prompts of other gateways count as ours do in the mean.
        """
        queue = self._queue(instance)
        own = len(queue)
        prompts = max(own, _reported_prompts(instance) + queue.sent_since(instance.state.telemetry_at))
        return prompts, queue.tokens + round((prompts - own) * queue.mean_tokens)

    def has_room(self, instance: Instance, tokens: int) -> bool:
        """Whether a decode instance has KV for twice so many tokens, and lets no request wait.

        What was sent to it since its report counts as well.
        """
        load, hello = instance.state.telemetry, instance.state.hello
        if load is None or hello is None or load.waiting:
            return False
        placed = self._queue(instance).placed_since(instance.state.telemetry_at)
        return instance.state.free_blocks * hello.block_size > 2 * (tokens + placed)

    def _slack_s(self, instance: Instance, step_s: float) -> float:
        """Return by how much a step may become longer; 0 while that is not known."""
        objective_s, fitted = self._tpot_s, instance.state.step_time.coefficients
        if objective_s is None:
            if fitted is None:
                return 0.0
            objective_s = default_tpot_s(float(fitted[0]), float(fitted[2]), float(instance.state.capacity_tokens))
        return max(0.0, objective_s - step_s)


def _reported_prompts(instance: Instance) -> int:
    """Return how many prompts an instance reported: of one that decodes too, those for other instances."""
    load = instance.state.telemetry
    if load is None:
        return 0
    return load.running + load.waiting if instance.role == "prefill" else load.prefilling


def _decoding(instance: Instance) -> int:
    """Return how many requests generate tokens on an instance, as it reported."""
    load = instance.state.telemetry
    return max(0, load.running - load.prefilling) if load is not None and instance.role != "prefill" else 0


def cached_tokens(placement: Placement, instances: Sequence[Instance]) -> IntArray:
    """Return how many of the tokens so far each instance is thought to have cached.

    The last one is computed in any case (v1/core/kv_cache_manager.py, 0.32).
    """
    found = np.zeros(len(instances), dtype=np.int64)
    for number, cached in enumerate(instance.state.cached for instance in instances):
        blocks = cached.leading(placement.block_hashes(cached.block_size))
        found[number] = min(blocks, (placement.tokens - 1) // cached.block_size) * cached.block_size
    return found


def _step_s(instance: Instance) -> float:
    load = instance.state.telemetry
    return load.step_time_s if load is not None and load.running else 0.0


def _transfer_s(instances: Sequence[Instance]) -> float:
    """Return the seconds that the KV of one token takes to a decode instance; 0 before anything was pulled."""
    seconds = [
        i.state.hello.token_bytes / i.state.telemetry.pull_bytes_per_s
        for i in instances
        if i.state.hello is not None and i.state.telemetry is not None and i.state.telemetry.pull_bytes_per_s
    ]
    return float(np.mean(seconds)) if seconds else 0.0
