"""Which instances may exchange KV and requests, by what they report."""

from typing import Any

import pytest

from ares.gateway.pool import compatibility
from ares.gateway.pool.compatibility import Decides, difference, largest_alike
from ares.protocol import messages

ENGINE = {
    "dtype": "bfloat16",
    "kv_cache_dtype": "auto",
    "quantization": "none",
    "model_configuration": "1a",
    "weights": "2b",
    "speculative_decoding": "off",
    "attention_backend": "auto",
    "model_runner": "V2",
}


def settings(block_size: int = 16, groups: list[messages.KvGroup] | None = None, **more: Any) -> compatibility.Values:
    return compatibility.values(
        messages.Hello(
            name="d",
            role="decode",
            boot="b",
            peer=messages.Peer("e", "127.0.0.1", 5600),
            block_size=block_size,
            kv_blocks=100,
            max_model_len=1000,
            versions={},
            kv_groups=groups or [],
            configuration={**ENGINE, **more},
        )
    )


@pytest.mark.parametrize(
    ("change", "decides", "said"),
    [
        ({"dtype": "float16"}, Decides.TOKENS, "data type (bfloat16, float16 there: --dtype)"),
        ({"kv_cache_dtype": "fp8"}, Decides.TOKENS, "KV cache data type (auto, fp8 there: --kv-cache-dtype)"),
        ({"quantization": "fp8"}, Decides.TOKENS, "quantisation (none, fp8 there: --quantization, "),
        ({"model_configuration": "1b"}, Decides.TOKENS, "model configuration (1a, 1b there: config.json, --hf-over"),
        ({"weights": "2c"}, Decides.TOKENS, "weights (2b, 2c there: the files of the model)"),
        ({"block_size": 32}, Decides.KV, "KV block size (16, 32 there: --block-size)"),
        ({"speculative_decoding": "eagle"}, Decides.KV, "drafts (no drafts with KV, eagle there: --speculative-"),
        ({"model_runner": "V1"}, Decides.DRAWS, "model runner (V2, V1 there: VLLM_USE_V2_MODEL_RUNNER)"),
    ],
)
def test_a_difference_is_named_with_both_values(change: dict[str, Any], decides: Decides, said: str) -> None:
    found = difference(settings(), settings(**change))
    assert found is not None
    assert found.startswith(said)
    assert difference(settings(), settings(**change), decides) == found
    assert difference(settings(), settings(**change), compatibility.ALL & ~decides) is None


def test_groups_of_kv_are_compared() -> None:
    full, window = messages.KvGroup(16), messages.KvGroup(16, window=512)
    assert "KV groups" in str(difference(settings(groups=[full]), settings(groups=[full, window])))


def test_what_makes_no_difference() -> None:
    """Drafts without KV, a backend that vLLM chose by itself, and what an earlier version does not report."""
    assert difference(settings(), settings(speculative_decoding="ngram")) is None
    assert difference(settings(), settings(attention_backend="FLASHINFER")) is None
    assert difference(settings(), settings(dtype="", weights="")) is None
    assert difference(settings(), None) is difference(None, None) is None
    assert "attention backend" in str(
        difference(settings(attention_backend="FLASHINFER"), settings(attention_backend="FLASH_ATTN"))
    )


def test_most_instances_are_the_measure() -> None:
    one, odd, silent = settings(), settings(dtype="float16"), settings(dtype="")
    assert largest_alike([]) is largest_alike([None]) is None
    assert largest_alike([odd, one, one]) == one
    assert largest_alike([odd, one]) == odd
    assert largest_alike([odd, one, silent, None, one]) in (one, silent)
