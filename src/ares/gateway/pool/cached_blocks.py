"""Which blocks an instance has in its prefix cache, by its KV events, or else by what was sent there.

It is an estimate and decides placement alone: the instance itself looks up what it has, so that a wrong entry costs
time and never a token.
"""

import math
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Sequence

import msgspec

from ares.gateway.pool.prompt_blocks import chain, root
from ares.protocol import kv_events, messages

# How long blocks count as cached that were sent to an instance: where it publishes what it caches, until that has come.
_SENT_S = 300.0
_SENT_WITH_EVENTS_S = 15.0
# A replay that has not come by then is asked for again.
_REPLAY_S = 2.0
# Of one instance; blocks take some 300 bytes each here. Of more, those that were stored first are dropped first.
MOST_BLOCKS = 1 << 20


class CachedBlocks:
    """The blocks of one instance from its start to its end.

    Parameters
    ----------
    block_size
        Tokens of a block.
    capacity
        Blocks that the instance has, and thus most that can be cached.
    publishes
        Whether it publishes KV events.

    Attributes
    ----------
    replays, lost, ignored
        How often batches were asked for again, how often they were lost for good so that all was forgotten, and how
        many stored blocks could not be used: of other block sizes, or after blocks that are not known.
    """

    def __init__(self, block_size: int = 1, capacity: int = 0, *, publishes: bool = False) -> None:
        self.block_size = block_size
        self.publishes = publishes
        self.replays = self.lost = self.ignored = 0
        self._most = min(capacity, MOST_BLOCKS)
        self._sent_s = _SENT_WITH_EVENTS_S if publishes else _SENT_S
        # By content: how many blocks of the instance have it. And the contents of the instance's own hashes.
        self._stored: Counter[bytes] = Counter()
        self._content: OrderedDict[kv_events.BlockHash, bytes] = OrderedDict()
        # By content: when it was sent there, the oldest first.
        self._sent: OrderedDict[bytes, float] = OrderedDict()
        self._next = 0
        self._asked_at = -_REPLAY_S

    def __len__(self) -> int:
        self._expire()
        return len(self._stored) + len(self._sent)

    @property
    def status(self) -> dict[str, int | bool]:
        """What operators are shown: blocks that are thought to be cached, and how their events came."""
        return {
            "blocks": len(self),
            "publishes": self.publishes,
            "replays": self.replays,
            "lost": self.lost,
            "ignored_blocks": self.ignored,
        }

    # --- what is asked ---

    def leading(self, hashes: Sequence[bytes]) -> int:
        """Return how many of these blocks, one after the other from the first on, it is thought to have.

        It looks at few of them: blocks are dropped from the last one on, so that before one that is there all are.
        """
        oldest = time.monotonic() - self._sent_s
        return bisect_left(hashes, True, key=lambda one: not self._has(one, oldest))

    def _has(self, one: bytes, oldest: float) -> bool:
        return one in self._stored or self._sent.get(one, -math.inf) > oldest

    # --- what was sent ---

    def sent(self, hashes: Sequence[bytes]) -> None:
        """Count blocks as cached from now on: their tokens were sent there."""
        now = time.monotonic()
        for one in reversed(hashes):  # a prompt's first blocks are the last ones to be dropped, as in vLLM
            if one not in self._stored:
                self._sent[one] = now
                self._sent.move_to_end(one)
        while len(self._sent) > self._most:
            self._sent.popitem(last=False)
        self._expire()

    def _expire(self) -> None:
        oldest = time.monotonic() - self._sent_s
        while self._sent and next(iter(self._sent.values())) <= oldest:
            self._sent.popitem(last=False)

    # --- its events ---

    @property
    def next(self) -> int:
        """Number of the first batch that has not been taken yet."""
        return self._next

    def receive(self, event: messages.KvEvents) -> int | None:
        """Take batches of events; return from which number on to ask for more: some are missing, or are kept there."""
        number, before = event.sequence, self._next
        if number > self._next:
            if event.kept_from <= self._next:
                return self._ask()
            if number > event.kept_from:  # what was kept longest is still to come
                return self._ask(event.kept_from)
            if self._next:
                self._forget()
            self._next = number
        for batch in event.batches[self._next - number :]:
            self._apply(batch)
            self._next += 1
        # An answer without a new batch brings nothing nearer: it would be asked for again without end.
        return self._next if event.end is not None and before < self._next < event.end else None

    def _ask(self, since: int | None = None) -> int | None:
        now = time.monotonic()
        if now - self._asked_at < _REPLAY_S:
            return None
        self._asked_at = now
        self.replays += 1
        return self._next if since is None else since

    def _forget(self) -> None:
        self.lost += 1
        self._stored.clear()
        self._content.clear()

    def _apply(self, body: bytes) -> None:
        try:
            changes = kv_events.decode(body).events
        except msgspec.DecodeError:  # an empty one, too: events that were lost on the instance
            self._forget()
            return
        for change in changes:
            match change:
                case kv_events.BlockStored():
                    self._store(change)
                case kv_events.BlockRemoved():
                    self._remove(change)
                case kv_events.AllBlocksCleared():
                    self._stored.clear()
                    self._content.clear()
                    self._sent.clear()

    def _store(self, change: kv_events.BlockStored) -> None:
        if change.medium not in (None, kv_events.GPU) or change.group_idx:
            return
        count = len(change.block_hashes)
        parent = self._parent(change)
        if parent is None or change.block_size != self.block_size or len(change.token_ids) != count * self.block_size:
            self.ignored += count
            return
        try:
            contents = chain(change.token_ids, self.block_size, parent)
        except ValueError:
            self.ignored += count
            return
        for name, content in zip(change.block_hashes, contents, strict=True):
            if self._content.setdefault(name, content) != content:  # hashes that collide
                del self._stored[self._content[name]]
                self._content[name] = content
            self._stored[content] += 1
            self._sent.pop(content, None)  # counted once
        while len(self._content) > self._most:
            _, content = self._content.popitem(last=False)
            del self._stored[content]

    def _parent(self, change: kv_events.BlockStored) -> bytes | None:
        """Return the content before the first of the blocks; None where it is unknown, or of more than tokens."""
        named = change.lora_name is not None  # then each block's keys begin with the name
        others = [(of_block or [])[named:] for of_block in change.extra_keys or []]
        if change.parent_block_hash is not None:
            return None if any(others) else self._content.get(change.parent_block_hash)
        salts = others[0] if others else []
        if any(others[1:]) or len(salts) > 1 or not all(isinstance(salt, str) for salt in salts):
            return None
        return root(change.lora_name, salts[0] if salts else None)

    def _remove(self, change: kv_events.BlockRemoved) -> None:
        if change.medium not in (None, kv_events.GPU) or change.group_idx:
            return
        for name in change.block_hashes:
            content = self._content.get(name)
            if content is None:
                continue
            self._sent.pop(content, None)
            self._stored[content] -= 1
            if self._stored[content] <= 0:
                del self._stored[content], self._content[name]
