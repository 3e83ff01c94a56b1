"""What an instance reports of itself: size, load, whether it drains."""

import time
from collections.abc import Set

from ares.gateway.control.cost_models import PrefillTimeModel, StepTimeModel
from ares.gateway.pool import compatibility
from ares.gateway.pool.cached_blocks import CachedBlocks
from ares.policy.kv_layout import KvLayout
from ares.predicted_load import layout_of
from ares.protocol import messages


class InstanceState:
    """The newest reports of one instance, and what follows from them.

    Attributes
    ----------
    hello, telemetry
        Its newest messages; None before the first, and while it is not connected.
    telemetry_at
        When the newest telemetry came (`time.monotonic`); 0 before the first.
    adapters
        Names of its LoRA adapters, as it described itself last.
    settings
        What it runs with, as far as that decides KV or tokens (compatibility.py), as it reported last; None before
        that.
    layout
        How many KV blocks a request holds there, by its tokens.
    step_time
        Its steps' duration by load, fitted to the telemetry since its start.
    prefill_time
        How long it takes for prompts, likewise, while it only prefills.
    cached
        The blocks in its prefix cache, as far as they are known.
    draining
        Whether it drains: as it reports, or by a command of ours that has not reached it yet.
    capacity_tokens
        KV capacity in KV tokens (policy/kv_layout.py); 0 while unknown.
    drain_deadline
        When requests that are still there must leave (`time.monotonic`); None where there is no deadline.
    """

    def __init__(self) -> None:
        self.hello: messages.Hello | None = None
        self.telemetry: messages.Telemetry | None = None
        self.telemetry_at = 0.0
        self.capacity_tokens = 0
        self.adapters: frozenset[str] = frozenset()
        self.settings: compatibility.Values | None = None
        self.layout = KvLayout(1)
        self.step_time = StepTimeModel(self.layout)
        self.prefill_time = PrefillTimeModel()
        self.cached = CachedBlocks()
        self.draining = False
        self.drain_deadline: float | None = None
        self._boot = ""

    def start(self, hello: messages.Hello) -> None:
        """Take the first message of an instance that has started, or has not known this gateway any more.

        What was learned of an instance that has not restarted holds.
        """
        known, self._boot = self._boot == hello.boot, hello.boot
        self.hello = hello
        self.capacity_tokens = layout_of(hello).capacity_tokens(hello.kv_blocks)
        self.settings = compatibility.values(hello)
        self.layout = layout_of(hello)
        if known:
            return
        caches = hello.prefix_caching or hello.kv_events
        self.cached = CachedBlocks(hello.block_size, hello.kv_blocks if caches else 0, publishes=hello.kv_events)
        self.step_time = StepTimeModel(self.layout)
        self.prefill_time = PrefillTimeModel()

    def update(self, telemetry: messages.Telemetry, now: float) -> None:
        """Take a report of its load, received at `now` (`time.monotonic`)."""
        # A report that was sent before a drain command arrived has the old value.
        if self.telemetry is None or telemetry.draining != self.telemetry.draining:
            self.draining = telemetry.draining
        if not self.draining:
            self.drain_deadline = None
        elif telemetry.drain_left_s is not None:
            self.drain_deadline = now + telemetry.drain_left_s
        self.telemetry, self.telemetry_at = telemetry, now
        self.step_time.observe(telemetry)
        self.prefill_time.observe(telemetry)

    def drain(self, deadline_s: float) -> None:
        """Count it as draining from now on, before it reports so itself."""
        self.draining, self.drain_deadline = True, time.monotonic() + deadline_s

    def undrain(self) -> None:
        """Count it as open again."""
        self.draining, self.drain_deadline = False, None

    def clear(self) -> None:
        """Forget the messages of an instance that is not connected any more."""
        self.hello = self.telemetry = None
        self.capacity_tokens = 0

    @property
    def free_blocks(self) -> int:
        """KV blocks that the newest telemetry shows free; 0 while unknown."""
        if self.hello is None or self.telemetry is None:
            return 0
        return self.hello.kv_blocks - self.telemetry.kv_blocks_used

    def lacks(self, needs: Set[str]) -> Set[str]:
        """Return which of these parts of a moved request's state it does not restore; empty while that is unknown."""
        return needs - set(self.hello.carries) if needs and self.hello is not None else frozenset()

    def fits(self, tokens: int) -> bool:
        """Whether a sequence may have so many tokens there; true while that is unknown."""
        return self.hello is None or tokens <= self.hello.max_model_len

    def serves(self, adapter: str | None) -> bool:
        """Whether it has this LoRA adapter; None is the model without one."""
        return adapter is None or adapter in self.adapters
