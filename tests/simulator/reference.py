"""A plain reference of the simulator: every step of every instance, one at a time, with lists and no closed forms."""

import heapq
from dataclasses import dataclass, field

import numpy as np

from ares.simulator.profile import Profile
from ares.traces import Workload


@dataclass
class Request:
    index: int
    prompt: int
    output: int
    generated: int = 0
    blocks: int = 0
    computed: int = 0
    remote: "Prefill | None" = None
    first_token: float | None = None
    finish: float | None = None
    preempted: int = 0


@dataclass
class Prefill:
    profile: Profile
    free: int
    queue: list[Request] = field(default_factory=list)
    current: Request | None = None
    egress: float = 0.0

    def backlog(self) -> int:
        return sum(r.prompt for r in self.queue) + (self.current.prompt if self.current else 0)


@dataclass
class Instance:
    profile: Profile
    free: int
    running: list[Request] = field(default_factory=list)  # in order of joining
    prompts: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    ready: list[Request] = field(default_factory=list)
    inbound: int = 0
    ingress: float = 0.0
    busy: bool = False
    order: list[Request] = field(default_factory=list)  # prompts and running in order of admission


class Reference:
    def __init__(
        self, work: Workload, decode: list[Profile], prefill: list[Profile], dispatch: str, watermark: int = 0
    ) -> None:
        self.work = work
        self.size = decode[0].block_size
        self.decode = [Instance(p, p.kv_tokens // p.block_size) for p in decode]
        self.total = [p.kv_tokens // p.block_size for p in decode]
        self.prefill = [Prefill(p, p.kv_tokens) for p in prefill]
        self.requests = [
            Request(i, int(n), int(o))
            for i, (n, o) in enumerate(zip(work.prompt_tokens, work.output_tokens, strict=True))
        ]
        self.dispatch = dispatch
        self.watermark = watermark
        self.robin = 0
        self.events: list[tuple[float, int, int, object, object]] = []
        self.count = 0
        self.preemptions = 0
        self.steps = 0

    def at(self, time: float, kind: int, action: object, argument: object) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, kind, self.count, action, argument))

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def run(self) -> "Reference":
        for request, arrival in zip(self.requests, self.work.arrival_s, strict=True):
            self.at(float(arrival), 0, self.arrive, request)
        while self.events:
            time, _, _, action, argument = heapq.heappop(self.events)
            action(time, argument)  # type: ignore[operator]
        return self

    def arrive(self, time: float, request: Request) -> None:
        if not self.prefill:
            self.place(time, request)
            return
        chosen = min(self.prefill, key=Prefill.backlog)
        chosen.queue.append(request)
        self.start_prefill(time, chosen)

    def pinned(self, request: Request) -> int:
        return self.blocks(request.prompt) * self.size

    def start_prefill(self, time: float, prefill: Prefill) -> None:
        if prefill.current or not prefill.queue or self.pinned(prefill.queue[0]) > prefill.free:
            return
        request = prefill.current = prefill.queue.pop(0)
        prefill.free -= self.pinned(request)
        step, budget = prefill.profile.step, prefill.profile.max_num_batched_tokens
        taken = step.base_s * -(-request.prompt // budget) + step.per_prefill_token_s * request.prompt
        taken += step.per_prefill_context_s * request.prompt**2 / 2
        self.at(time + taken, 2, self.prefilled, prefill)

    def prefilled(self, time: float, prefill: Prefill) -> None:
        request = prefill.current
        assert request is not None
        prefill.current = None
        request.remote = prefill
        self.place(time, request)
        self.start_prefill(time, prefill)

    def place(self, time: float, request: Request) -> None:
        if self.dispatch == "round_robin":
            instance = self.decode[self.robin % len(self.decode)]
            self.robin += 1
        else:

            def share(index: int) -> float:
                instance = self.decode[index]
                unfinished = instance.waiting + instance.prompts
                prompts = sum(r.prompt + r.generated - r.blocks * self.size for r in unfinished)
                used = (self.total[index] - instance.free) * self.size + prompts
                return (used + request.prompt) / (self.total[index] * self.size)

            instance = self.decode[min(range(len(self.decode)), key=share)]
        instance.waiting.append(request)
        self.request_step(time, instance)

    def request_step(self, time: float, instance: Instance) -> None:
        if not instance.busy:
            instance.busy = True
            self.at(time, 2, self.boundary, (instance, False))

    def arrived(self, time: float, pair: tuple[Instance, Request]) -> None:
        instance, request = pair
        assert request.remote is not None
        prefill, request.remote = request.remote, None
        prefill.free += self.pinned(request)
        instance.inbound -= 1
        instance.ready.append(request)
        self.request_step(time, instance)
        self.start_prefill(time, prefill)

    def boundary(self, time: float, pair: tuple[Instance, bool]) -> None:
        instance, after_step = pair
        if after_step:
            self.end_step(time, instance)
        for request in instance.ready:
            instance.running.append(request)
            instance.order.append(request)
        instance.ready = []
        preempts = self.take_blocks(instance)
        budget = instance.profile.max_num_batched_tokens - len(instance.running)
        budget, prompt_time = self.continue_prompts(instance, budget)
        if not preempts:
            prompt_time += self.admit(time, instance, budget)
        instance.busy = bool(instance.order)
        if instance.busy:
            step = instance.profile.step
            resident = sum(r.prompt + r.generated for r in instance.running)
            taken = step.base_s + step.per_request_s * len(instance.running) + step.per_resident_token_s * resident
            self.at(time + taken + prompt_time, 2, self.boundary, (instance, True))

    def end_step(self, time: float, instance: Instance) -> None:
        """Count the token of every request that decoded or whose prompt is complete; end those that are done."""
        self.steps += 1
        for request in list(instance.order):
            if request in instance.prompts and request.computed < request.prompt + request.generated:
                continue
            request.generated += 1
            if request.first_token is None:
                request.first_token = time
            if request in instance.prompts:
                instance.prompts.remove(request)
                instance.running.append(request)
            if request.generated == request.output:
                request.finish = time
                instance.running.remove(request)
                instance.order.remove(request)
                instance.free += request.blocks

    def take_blocks(self, instance: Instance) -> bool:
        """Give every decoding request its block, preempting the newest until all fit; return whether it did."""
        preempts = False
        while sum(self.blocks(r.prompt + r.generated) - r.blocks for r in instance.running) > instance.free:
            preempts = True
            self.preempt(instance)
        for request in instance.running:
            need = self.blocks(request.prompt + request.generated) - request.blocks
            instance.free -= need
            request.blocks += need
        return preempts

    def continue_prompts(self, instance: Instance, budget: int) -> tuple[int, float]:
        """Compute the next chunk of each prompt in progress; return the token budget left and the seconds taken."""
        seconds = 0.0
        for request in list(instance.prompts):
            if request not in instance.prompts or budget <= 0:
                continue
            chunk = min(request.prompt + request.generated - request.computed, budget)
            need = self.blocks(request.computed + chunk) - request.blocks
            while need > instance.free and request in instance.prompts:
                self.preempt(instance)
            if request in instance.prompts:
                budget -= chunk
                seconds += self.compute(instance, request, chunk, need)
        return budget, seconds

    def admit(self, time: float, instance: Instance, budget: int) -> float:
        """Admit the waiting in order while slots, blocks and budget last; return the seconds of their first chunks."""
        seconds = 0.0
        while instance.waiting:
            request = instance.waiting[0]
            occupied = len(instance.order) + instance.inbound
            if occupied >= instance.profile.max_num_seqs:
                break
            tokens = request.prompt + request.generated
            if self.blocks(tokens) > instance.free - (self.watermark if occupied else 0):
                break
            if request.remote is not None:
                instance.waiting.pop(0)
                self.pull(time, instance, request, request.remote)
                continue
            chunk = min(tokens, budget)
            if chunk <= 0:
                break
            instance.waiting.pop(0)
            instance.prompts.append(request)
            instance.order.append(request)
            budget -= chunk
            seconds += self.compute(instance, request, chunk, self.blocks(chunk))
        return seconds

    def pull(self, time: float, instance: Instance, request: Request, prefill: Prefill) -> None:
        tokens = request.prompt + request.generated
        request.blocks = self.blocks(tokens - 1)
        instance.free -= request.blocks
        start = max(time, prefill.egress, instance.ingress)
        end = start + tokens * instance.profile.kv_bytes_per_token / instance.profile.bandwidth_bytes_s
        prefill.egress = instance.ingress = end
        instance.inbound += 1
        self.at(end + instance.profile.latency_s, 1, self.arrived, (instance, request))

    def compute(self, instance: Instance, request: Request, chunk: int, need: int) -> float:
        step = instance.profile.step
        taken = step.per_prefill_token_s * chunk + step.per_prefill_context_s * chunk * (request.computed + chunk / 2)
        instance.free -= need
        request.blocks += need
        request.computed += chunk
        return taken

    def preempt(self, instance: Instance) -> None:
        request = instance.order.pop()
        (instance.prompts if request in instance.prompts else instance.running).remove(request)
        instance.free += request.blocks
        request.blocks = request.computed = 0
        request.preempted += 1
        self.preemptions += 1
        instance.waiting.insert(0, request)

    def first_tokens(self) -> np.ndarray:
        return np.array([r.first_token for r in self.requests], float)

    def finishes(self) -> np.ndarray:
        return np.array([r.finish for r in self.requests], float)
