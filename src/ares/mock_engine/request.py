"""One request on a mock instance."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from ares.mock_engine.http import Connection
from ares.mock_engine.model import fold

State = Literal["arriving", "waiting", "loading", "running", "finished"]


@dataclass(slots=True)
class Cut:
    """A `Cut` that is being carried out: its sender and call number."""

    sender: bytes
    call: int


@dataclass(slots=True, eq=False)
class Request:
    """A request from its arrival to its end. Lengths are in tokens.

    Attributes
    ----------
    id, key, name
        The client's id; the gateway's key, None without a gateway; a name that is unique on this instance.
    prompt
        Its prompt, the output of earlier instances included; `generated` counts that output.
    state, hash
        Its state; the model's state after all its tokens.
    end, natural_end
        Tokens of output on this instance after which its limit, or its own end, comes.
    check_from
        Number of output tokens from which on each token may be the last and is checked; 0: all of them.
    computed, blocks, chunk
        Tokens whose KV is here, blocks allocated, and tokens that the running step computes.
    interval, sends_tokens
        Tokens of an event of its stream; whether they also go to its gateway after each step.
    sent
        Output tokens sent so far, while some wait for their event or for a slow client; None otherwise.
    source
        vLLM's kv_transfer_params of the KV that it has still to pull.
    unwanted
        Whether its KV is not to be pinned at the end.
    abandoned
        Whether its gateway is gone, so that it ends with its next token.
    salt, cached
        Keeps its KV apart in prefix caches; tokens of its prompt that were cached, None before they were looked up.
    script
        Token ids that its client wants as its whole output, that of earlier instances included; empty: the model's.
    """

    id: str
    key: str | None
    prompt: list[int]
    generated: int
    hash: int
    prompt_hash: int
    end: int
    natural_end: int
    connection: Connection
    name: str = ""
    stream: bool = True
    priority: int = 0
    arrival: int = 0
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    interval: int = 1
    sends_tokens: bool = False
    remote_decode: bool = False
    source: dict[str, Any] | None = None
    state: State = "arriving"
    check_from: int = 0
    output: list[int] = field(default_factory=list)
    length: int = 0
    computed: int = 0
    blocks: int = 0
    chunk: int = 0
    sent: int | None = None
    heads: tuple[bytes, ...] = ()
    cut: Cut | None = None
    unwanted: bool = False
    abandoned: bool = False
    script: list[int] = field(default_factory=list)
    preemptions: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    queued_s: float = 0.0
    admitted: bool = False
    salt: str = ""
    cached: int | None = None

    def __post_init__(self) -> None:
        self.length = len(self.prompt)
        checked = self.stop_tokens or self.logprobs is not None or self.script
        self.check_from = 0 if checked else min(self.end, self.natural_end)

    def scripted(self) -> int | None:
        """Return its next token where its client has given one."""
        position = self.generated + len(self.output)
        return self.script[position] if position < len(self.script) else None

    def resume_from(self, tokens: int, state: int) -> None:
        """Continue from pulled KV: from the model's state after that many tokens."""
        if tokens <= len(self.prompt):
            self.hash = fold(self.prompt[tokens:], state)

    def limit(self, end: int) -> None:
        """End it after fewer tokens of output."""
        self.end = end
        self.check_from = min(self.check_from, end)
