"""Continuous batching as in vLLM v1's scheduler: what a step computes, and which request is preempted.

Pure state, no clock: `schedule` returns what the next step computes, and its seconds by the profile's step-time model.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from ares.mock_engine.request import Request
from ares.simulator.profile import Profile

Policy = Literal["fcfs", "priority"]


@dataclass(slots=True)
class Step:
    """One step: the requests it computes, those that get a token at its end, those that begin in it, its seconds.

    Of the tokens that it computes, `prompt_tokens` are of prompts.
    """

    scheduled: list[Request] = field(default_factory=list)
    samplers: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    seconds: float = 0.0
    prompt_tokens: int = 0


class Batch:
    """The requests of one instance and its KV blocks.

    Parameters
    ----------
    profile
        Step-time model and limits.
    blocks
        KV capacity in blocks.
    policy
        `fcfs`: the newest running request is preempted; `priority`: the one with the largest (priority, arrival).
    pull
        Called once a request has blocks for the KV that it pulls; `loaded` or `remove` follows.
    cached
        Returns how many tokens of a request are in the prefix cache, all but at least one.
    """

    def __init__(
        self,
        profile: Profile,
        blocks: int,
        policy: Policy,
        pull: Callable[[Request], None],
        cached: Callable[[Request], int] = lambda _: 0,
    ) -> None:
        self.size = profile.block_size
        self.total = self.free = blocks
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.loading: set[Request] = set()
        self.preemptions = 0
        self.prompt_tokens = 0
        self.ready: list[Request] = []
        self._step_time = profile.step
        self._max_running = profile.max_num_seqs
        self._budget = profile.max_num_batched_tokens
        self._watermark = int(profile.watermark * blocks)
        self._by_priority = policy == "priority"
        # As in vLLM, priorities mean nothing without the policy.
        self._order = attrgetter("priority", "arrival") if self._by_priority else attrgetter("arrival")
        self._pull = pull
        self._cached = cached

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks for this many tokens."""
        return -(-tokens // self.size)

    @property
    def queued(self) -> int:
        """Number of requests that wait to be scheduled, those whose KV has just arrived included."""
        return len(self.waiting) + len(self.ready)

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.state = "waiting"
        bisect.insort(self.waiting, request, key=self._order)

    def loaded(self, request: Request, tokens: int) -> None:
        """Record that the KV of this many tokens has arrived; 0 where the pull failed and all is computed here."""
        self.loading.discard(request)
        request.computed = tokens
        request.state = "waiting"
        # Before all others: what it needs is allocated already.
        self.ready.append(request)

    def remove(self, request: Request) -> int:
        """Take a request out for good; return its blocks, which the caller frees or pins."""
        for place in (self.running, self.waiting, self.ready):
            if request in place:
                place.remove(request)
                break
        self.loading.discard(request)
        request.state = "finished"
        request.chunk = 0
        blocks, request.blocks = request.blocks, 0
        return blocks

    def schedule(self) -> Step | None:
        """Plan the next step; None where nothing can be computed now."""
        step = Step()
        budget, preempted = self._schedule_running(step)
        if not preempted:
            self._schedule_waiting(step, budget)
        if not step.scheduled:
            return None
        self._price(step)
        return step

    def complete(self, step: Step) -> None:
        """Count what a step has computed."""
        self.prompt_tokens += step.prompt_tokens
        for request in step.scheduled:
            request.computed += request.chunk
            request.chunk = 0

    def _price(self, step: Step) -> None:
        model = self._step_time
        decoding = resident = 0
        seconds = model.base_s
        for request in step.scheduled:
            chunk = request.chunk
            step.prompt_tokens += max(0, min(chunk, len(request.prompt) - request.computed))
            whole = request.computed + chunk == request.length
            if whole:
                step.samplers.append(request)
            if chunk == 1 and whole:
                decoding += 1
                resident += request.length
            else:
                context = request.computed + chunk / 2.0
                seconds += model.per_prefill_token_s * chunk + model.per_prefill_context_s * chunk * context
        step.seconds = seconds + model.per_request_s * decoding + model.per_resident_token_s * resident

    def _schedule_running(self, step: Step) -> tuple[int, bool]:
        budget = self._budget
        index = 0
        preempted = False
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            chunk = min(request.length - request.computed, budget)
            need = self.blocks_for(request.computed + chunk) - request.blocks
            while need > self.free:
                preempted = True
                victim = max(self.running, key=self._order) if self._by_priority else self.running[-1]
                if self.running.index(victim) < index:
                    index -= 1
                if victim.chunk:
                    step.scheduled.remove(victim)
                    budget += victim.chunk
                self.preempt(victim)
                if victim is request:
                    break
            else:
                self.free -= max(0, need)
                request.blocks += max(0, need)
                request.chunk = chunk
                step.scheduled.append(request)
                budget -= chunk
                index += 1
                continue
            break
        return budget, preempted

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks away and queue it again; its tokens are computed again later."""
        self.running.remove(request)
        self.free += request.blocks
        request.blocks = request.computed = request.chunk = 0
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def _schedule_waiting(self, step: Step, budget: int) -> None:
        while budget > 0 and len(self.running) < self._max_running:
            queue = self.ready or self.waiting
            if not queue:
                return
            request = queue[0]
            available = self.free - (self._watermark if self.running or self.loading else 0)
            # The whole sequence must fit, not its first chunk alone: vLLM's scheduler_reserve_full_isl.
            whole = self.blocks_for(request.length) - request.blocks
            if whole > 0 and whole > available:
                return
            del queue[0]
            if not request.computed:
                found = self._cached(request)
                request.cached = found if request.cached is None else request.cached
                # What is pulled is pulled as a whole: only its time is shorter (instance.py).
                request.computed = 0 if request.source is not None else found
            if request.source is not None:
                self.free -= whole
                request.blocks += whole
                request.state = "loading"
                self.loading.add(request)
                self._pull(request)
                continue
            chunk = min(request.length - request.computed, budget)
            need = max(0, self.blocks_for(request.computed + chunk) - request.blocks)
            self.free -= need
            request.blocks += need
            request.chunk = chunk
            request.state = "running"
            self.running.append(request)
            step.scheduled.append(request)
            step.admitted.append(request)
            budget -= chunk
