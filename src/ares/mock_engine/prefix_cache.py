"""The prefix cache of a mock instance: which blocks it would still have, and vLLM's events about them.

It holds as many blocks as the instance has, the least recently used leave first. A hit saves time and no memory: blocks
are not shared between running requests.
"""

import time
import uuid
from collections import OrderedDict

import zmq

from ares.engine.kv_events import KvEventLog
from ares.mock_engine.model import fold
from ares.protocol import kv_events


class PrefixCache:
    """The cached blocks of one instance.

    Parameters
    ----------
    blocks, block_size
        Most blocks, and tokens of one.

    Attributes
    ----------
    log
        Its events, as those of a real engine; None where nothing is cached.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self._most, self._size = blocks, block_size
        # By the model's state at the end of each block; in the order of use.
        self._blocks: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._number = 0
        self.log: KvEventLog | None = None
        if blocks:
            endpoint = f"inproc://{uuid.uuid4().hex}"
            self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(endpoint)
            self.log = KvEventLog(endpoint)

    def close(self) -> None:
        """Publish nothing more."""
        if self._most:
            self._socket.close()

    def cached(self, tokens: list[int], salt: str) -> int:
        """Return how many of these tokens, from the first on, need not be computed: all but at least one."""
        if not self._blocks:
            return 0
        found = 0
        for name in self._names(tokens[: len(tokens) - 1], salt):
            if name not in self._blocks:
                break
            self._blocks.move_to_end(name)
            found += self._size
        return found

    def store(self, tokens: list[int], salt: str) -> None:
        """Keep the full blocks of these tokens, whose KV has been computed or has come."""
        if not self._most:
            return
        names = self._names(tokens, salt)
        events: list[kv_events.Change] = []
        for number, name in enumerate(names):
            if name not in self._blocks:
                events.append(self._stored(names, number, tokens, salt))
            self._blocks[name] = None
        for name in reversed(names):  # the first blocks are the last ones to leave
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._most:
            (_, state), _ = self._blocks.popitem(last=False)
            events.append(kv_events.BlockRemoved([state], kv_events.GPU))
        if events:
            body = kv_events.encode(kv_events.Batch(time.time(), events))
            self._socket.send_multipart((b"", self._number.to_bytes(8, "big"), body))
            self._number += 1

    def _stored(self, names: list[tuple[str, int]], number: int, tokens: list[int], salt: str) -> kv_events.BlockStored:
        return kv_events.BlockStored(
            block_hashes=[names[number][1]],
            parent_block_hash=names[number - 1][1] if number else None,
            token_ids=tokens[number * self._size : (number + 1) * self._size],
            block_size=self._size,
            medium=kv_events.GPU,
            extra_keys=[[salt] if salt and not number else None],
        )

    def _names(self, tokens: list[int], salt: str) -> list[tuple[str, int]]:
        state, names = fold(salt.encode()), []
        for end in range(self._size, len(tokens) + 1, self._size):
            state = fold(tokens[end - self._size : end], state)
            names.append((salt, state))
        return names
