"""The blocks of a prompt, each named by the content of everything up to its end: the same for all instances.

vLLM's own hashes depend on an instance's algorithm and seed. A block's KV depends on what is hashed here: the tokens
up to its end, the LoRA adapter, and the cache salt, which keeps clients apart (v1/core/kv_cache_utils.py, 0.32).
"""

from array import array
from collections.abc import Iterable
from hashlib import blake2b

_DIGEST_BYTES = 8


def root(adapter: str | None, cache_salt: str | None) -> bytes:
    """Return the hash that comes before that of the first block."""
    return blake2b(repr((adapter, cache_salt)).encode(), digest_size=_DIGEST_BYTES).digest()


def chain(tokens: Iterable[int], block_size: int, parent: bytes) -> list[bytes]:
    """Return the hash of each full block of tokens that follow `parent`; ValueError where one is no token id."""
    try:
        packed = memoryview(array("I", tokens)).cast("B")
    except (OverflowError, TypeError) as error:
        raise ValueError(f"no token ids: {error}") from error
    width = block_size * array("I").itemsize
    hashes = []
    for end in range(width, len(packed) + 1, width):
        block = blake2b(parent, digest_size=_DIGEST_BYTES)
        block.update(packed[end - width : end])
        parent = block.digest()
        hashes.append(parent)
    return hashes


class PromptBlocks:
    """The blocks of one prompt; computed once for each block size among the instances."""

    def __init__(self, adapter: str | None, cache_salt: str | None) -> None:
        self._root = root(adapter, cache_salt)
        self._known: dict[int, list[bytes]] = {}

    def hashes(self, prompt: list[int], output: list[int], block_size: int) -> list[bytes]:
        """Return the hash of each full block; the output is that of the last call, or begins with it."""
        known = self._known.setdefault(block_size, [])
        done = len(known) * block_size
        if len(prompt) + len(output) - done >= block_size:
            rest = prompt[done:] + output[max(0, done - len(prompt)) :]
            known += chain(rest, block_size, known[-1] if known else self._root)
        return known
