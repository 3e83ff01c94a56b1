"""Which KV a request exports when it ends: that of its own tokens, without drafts beyond the end of its output.

Under speculative decoding vLLM counts more tokens as computed than a request has (`Request.num_computed_tokens` in
v1/core/sched/scheduler.py): the drafts that the model accepted after the token at which `max_tokens` ended the output,
and with asynchronous scheduling all tokens of a step that had begun by then. The stock connector exports the blocks of
that count, which may be one more than the request's tokens fill. A target pairs blocks from the last one backwards
(nixl/base_worker.py:_apply_prefix_caching): with one too many, each block that it pulls is the one after it.
"""

from collections.abc import Callable
from typing import Any

from ares.engine.vllm_api import Request
from ares.protocol import fields


def is_shortened(request: Request) -> bool:
    """Whether vLLM has left the last tokens of a prefill's prompt to the decode instance.

    It does for models with states instead of KV (Mamba) and for multi-token prediction by several modules
    (nixl/base_scheduler.py:_truncate_request_for_prefill). The token that such a prefill samples follows the shorter
    prompt: it is not the first of the output.
    """
    return bool((request.kv_transfer_params or {}).get("_p_side_truncated"))


def restrict_to_output(
    transfer: dict[str, Any],
    request: Request,
    known: int,
    manager: Any,
    clip: Callable[[tuple[list[int], ...]], Any],
    *,
    has_state: bool,
) -> None:
    """Restrict the `kv_transfer_params` of a request that has ended to the KV of its tokens.

    The KV of its newest token is not computed yet. Where KV of earlier tokens is gone, the target pulls nothing and
    computes all of them.

    Parameters
    ----------
    known
        Tokens whose KV a target pulls: it computes the last again, or several where multi-token prediction has modules
        that look ahead.
    manager
        vLLM's KVCacheManager.
    clip
        Clips block ids to those that instances exchange (nixl/base_scheduler.py:get_exchange_clipped_blocks).
    has_state
        Whether the model has layers with a state instead of KV (Mamba): it is that after the last computed token, and
        no other.
    """
    if is_shortened(request):
        return
    if request.num_computed_tokens <= known:
        return
    block_ids = manager.get_block_ids_for_computed_tokens(request.request_id, known)
    transfer[fields.REMOTE_BLOCK_IDS] = clip(block_ids)
    transfer[fields.REMOTE_NUM_TOKENS] = 0 if has_state or _lacks_window(block_ids, manager, known) else known


def _lacks_window(block_ids: tuple[list[int], ...], manager: Any, known: int) -> bool:
    """Whether a block that the next token attends to was freed, since it was out of the window of a later one."""
    null = manager.block_pool.null_block.block_id
    kinds = manager.coordinator.single_type_managers
    return any(
        null in ids[kind.get_num_skipped_tokens(known) // kind.block_size :]
        for kind, ids in zip(kinds, block_ids, strict=True)
    )
