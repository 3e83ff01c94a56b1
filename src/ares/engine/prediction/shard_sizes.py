"""Divides recorded outputs into shards that fit a message to a learner (`rpc.MAX_MESSAGE_BYTES`)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ares.predictor.shards import Output, Source

LARGEST_BYTES = 2 << 20
_MOST_OUTPUTS = 64
# An output with more token ids than this is written without them.
_MOST_TOKEN_IDS = LARGEST_BYTES // 16
# Bytes of an output without states and token ids: its lengths, the names of it and of its prompt, its outcome.
_OUTPUT_BYTES = 512


def shards_of(outputs: Sequence[Output], source: Source, *, token_ids: bool) -> Iterator[tuple[list[Output], bool]]:
    """Yield the outputs of each shard, and whether it is to hold their token ids.

    An output whose states do not fit one shard is divided like one that was written in pieces.
    """
    long = [_tokens(output) > _MOST_TOKEN_IDS for output in outputs]
    for with_ids in (True, False):
        chosen = [o for o, is_long in zip(outputs, long, strict=True) if (token_ids and not is_long) is with_ids]
        for shard in _divided(chosen, source, token_ids=with_ids):
            yield shard, with_ids


def _divided(outputs: Sequence[Output], source: Source, *, token_ids: bool) -> Iterator[list[Output]]:
    shard: list[Output] = []
    total = 0
    for part in (part for output in outputs for part in _parts(output, source, token_ids=token_ids)):
        size = _fixed_bytes(part, token_ids=token_ids) + len(part.positions) * _state_bytes(source)
        if shard and (total + size > LARGEST_BYTES or len(shard) == _MOST_OUTPUTS):
            yield shard
            shard, total = [], 0
        shard.append(part)
        total += size
    if shard:
        yield shard


def _parts(output: Output, source: Source, *, token_ids: bool) -> Iterator[Output]:
    most = max(1, (LARGEST_BYTES - _fixed_bytes(output, token_ids=token_ids)) // _state_bytes(source))
    for first in range(0, max(1, len(output.positions)), most):
        chosen = slice(first, first + most)
        yield replace(output, positions=output.positions[chosen], states=output.states[chosen])


def _tokens(output: Output) -> int:
    return len(output.prompt_tokens) + len(output.output_tokens)


def _fixed_bytes(output: Output, *, token_ids: bool) -> int:
    return _OUTPUT_BYTES + len(output.request) + (4 * _tokens(output) if token_ids else 0)


def _state_bytes(source: Source) -> int:
    """Return the bytes of a state in half precision, and of the three numbers with it."""
    return 2 * source.hidden_size + 12
