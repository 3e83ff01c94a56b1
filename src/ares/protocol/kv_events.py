"""vLLM's KV events: which blocks enter and leave the prefix cache of an instance (distributed/kv_events.py, 0.32).

A batch is what vLLM publishes after a step. Only the fields that are used here are named; msgspec ignores the others.
"""

from collections.abc import Callable
from typing import Any

import msgspec

# A block's hash: of the whole prefix up to its end, by the instance's own algorithm and seed.
BlockHash = bytes | int
GPU = "GPU"


class BlockStored(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Full blocks, one after the other, now in the cache.

    `token_ids` are those of all the blocks, `parent_block_hash` that of the block before them. `extra_keys` has for
    each block what its hash depends on besides tokens: the name of the LoRA adapter, the cache salt, and others.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Blocks no longer in the cache."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """The cache is empty."""


Change = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What one step changed, in order; `ts` is in seconds since 1970."""

    ts: float
    events: list[Change]


encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], Batch] = msgspec.msgpack.Decoder(Batch).decode


def decode(body: bytes) -> Batch:
    """Return a batch; msgspec.DecodeError where it is none."""
    try:
        return _decode(body)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
