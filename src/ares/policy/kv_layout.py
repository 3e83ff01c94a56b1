"""How many KV blocks a request holds, over all KV cache groups of its model.

vLLM gives each group of layers a block table of its own, and takes the blocks of all groups from one pool
(v1/core/kv_cache_utils.py, 0.32). Full attention holds a block for every `block_tokens` tokens; a sliding window gives
back what lies before it (v1/core/single_type_kv_cache_manager.py: `get_num_skipped_tokens`); a recurrent layer holds
the same few blocks at any length.

Policies compare tokens and let each request grow by one token a step. So a request counts here with *KV tokens*: one
for each of its own tokens, and those that the blocks of the bounded groups would hold. In that unit each request still
grows by one a step, and an instance's capacity is a number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class KvGroup(NamedTuple):
    """Layers with one block table.

    Attributes
    ----------
    block_tokens
        Tokens of a block.
    window
        Tokens that attention reaches back, the next one included; 0: all.
    fixed_blocks
        Blocks that a request holds at any length; 0: as many as its tokens take.
    """

    block_tokens: int
    window: int = 0
    fixed_blocks: int = 0

    @property
    def is_bounded(self) -> bool:
        """Whether a long request holds no more blocks than a shorter one."""
        return bool(self.window or self.fixed_blocks)

    def blocks(self, tokens: int) -> int:
        """Return the blocks of a request with room for so many tokens, the one that is computed next included."""
        if self.fixed_blocks or not tokens:
            return self.fixed_blocks if tokens else 0
        skipped = max(0, tokens - self.window) // self.block_tokens if self.window else 0
        return -(-tokens // self.block_tokens) - skipped

    def most_blocks(self, tokens: int, longest: int) -> int:
        """Return the most blocks that a request holds while it grows from `tokens` to `longest`."""
        if not self.window or longest <= self.window:
            return self.blocks(max(tokens, longest))
        return max(self.blocks(self.window), 1 - (1 - self.window) // self.block_tokens)


@dataclass(frozen=True)
class KvLayout:
    """The KV cache groups of an instance.

    Attributes
    ----------
    block_tokens
        Tokens of a block of the groups that grow with a request; the unit in which policies round.
    groups
        All groups that share the pool; none means a single one that grows.
    """

    block_tokens: int
    groups: tuple[KvGroup, ...] = ()

    @classmethod
    def of(cls, block_tokens: int, groups: Sequence[KvGroup]) -> "KvLayout":
        """Return the layout; a single group that grows is the plain one."""
        return cls(block_tokens, () if groups in ([], [KvGroup(block_tokens)]) else tuple(groups))

    @cached_property
    def _bounded(self) -> tuple[KvGroup, ...]:
        return tuple(group for group in self.groups if group.is_bounded)

    @cached_property
    def growing_blocks(self) -> float:
        """Blocks that `block_tokens` further tokens take of the groups that grow; 1 where none grows."""
        return sum(self.block_tokens / group.block_tokens for group in self.groups if not group.is_bounded) or 1.0

    def blocks(self, tokens: int) -> int:
        """Return the blocks of a request with room for so many tokens, the one that is computed next included."""
        if not self.groups:
            return -(-tokens // self.block_tokens)
        return sum(group.blocks(tokens) for group in self.groups)

    def kv_tokens(self, tokens: int, ahead: int = 0) -> int:
        """Return the KV tokens of a request with so many tokens, which may grow by `ahead` more.

        The bounded groups count with the most that they hold meanwhile; the others with the tokens themselves, which
        the policy rounds up to blocks.
        """
        if not self._bounded or not tokens:
            return tokens
        # One more: the token that is computed next has a slot.
        now = tokens + 1
        bounded = sum(g.most_blocks(now, now + ahead) if ahead else g.blocks(now) for g in self._bounded)
        own = tokens if len(self._bounded) < len(self.groups) else 0
        return own + math.ceil(bounded * self.block_tokens / self.growing_blocks)

    def capacity_tokens(self, blocks: int) -> int:
        """Return how many KV tokens so many blocks hold."""
        return int(blocks * self.block_tokens / self.growing_blocks)
