"""What to generate, and how an instance is asked for its part of it."""

from dataclasses import dataclass, field
from typing import Any

from ares.protocol import fields

# vLLM's priority is a signed 64-bit number in a JSON body; far below what a double holds exactly.
LARGEST_PRIORITY = 1 << 40


@dataclass(frozen=True, slots=True)
class Sampling:
    """What to generate.

    Attributes
    ----------
    parameters
        vLLM sampling parameters, without the limits below.
    maximum_tokens, minimum_tokens
        Limits on the whole output, however many instances it comes from.
    unmovable_reason
        The parameter whose state a move would not carry exactly, or None where the session may move.
    needs
        What an instance must restore (`messages.Hello.carries`) to continue after another; empty where it never moves.
    adapter
        The LoRA adapter to generate with; None: the model without one.
    cache_salt
        Keeps the KV of its prompts apart in prefix caches (vLLM's `cache_salt`).
    engine_fields
        Further fields of the engine's request, as of the prompt (`parsing.OutputFormat`).
    """

    parameters: dict[str, Any]
    maximum_tokens: int
    minimum_tokens: int = 0
    unmovable_reason: str | None = None
    needs: frozenset[str] = frozenset()
    adapter: str | None = None
    cache_salt: str | None = None
    engine_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def restored(self) -> bool:
        """Whether an instance restores its state from the output so far (engine/connector/resume_output.py)."""
        return bool(self.needs)

    def prefill_request(
        self, key: str, prompt: list[int], emitted: list[int], first_forecast: str = ""
    ) -> dict[str, Any]:
        """Return the request that computes all tokens so far and one more, and keeps the KV for a decode instance."""
        missing = max(0, self.minimum_tokens - len(emitted))
        parameters = {**self.parameters, "max_tokens": 1, "min_tokens": min(1, missing)}
        if missing > 1:
            # Below its minimum no repetition ends an output, and the instance does not know it.
            parameters.pop("repetition_detection", None)
        params: dict[str, Any] = {}
        if self.maximum_tokens - len(emitted) > 1:
            params = {fields.DO_REMOTE_DECODE: True, fields.DO_REMOTE_PREFILL: False}
            if self.unmovable_reason is not None:
                # State that is not carried starts at the decode instance, first token included.
                parameters = {"max_tokens": 1, "temperature": 0.0}
        body = _body(key, prompt + emitted, parameters, {**params, **self._output(emitted, first_forecast)}, self)
        return {**self.engine_fields, **body}

    def decode_request(
        self,
        key: str,
        prompt: list[int],
        emitted: list[int],
        kv_transfer_params: dict[str, Any] | None,
        *,
        priority: int = 0,
        first_forecast: str = "",
    ) -> dict[str, Any]:
        """Return the request that continues after `emitted`; without `kv_transfer_params` its KV is computed again.

        Where an instance runs out of memory, it preempts the request with the largest `priority`.
        """
        parameters = {
            **self.parameters,
            "max_tokens": self.maximum_tokens - len(emitted),
            "min_tokens": max(0, self.minimum_tokens - len(emitted)),
        }
        params = {**(kv_transfer_params or {}), **self._output(emitted, first_forecast)}
        body = {**self.engine_fields, **_body(key, prompt + emitted, parameters, params, self)}
        return {**body, "priority": priority} if priority else body

    def _output(self, emitted: list[int], first_forecast: str) -> dict[str, Any]:
        return {
            fields.GENERATED_TOKENS: len(emitted),
            **({fields.FIRST_FORECAST: first_forecast} if first_forecast else {}),
            **({fields.RESUME_OUTPUT: True} if self.restored and emitted else {}),
        }


def precopy_request(
    key: str, tokens: list[int], kv_transfer_params: dict[str, Any], sampling: Sampling, *, background: bool = False
) -> dict[str, Any]:
    """Return the request that pulls the KV of all `tokens` but the last; its one output token is not used.

    It names adapter and salt: vLLM keeps the KV of each apart in its prefix cache (v1/core/kv_cache_utils.py,
    `generate_block_hash_extra_keys`). In the background it has the largest priority, that is, it goes last.
    """
    params = {**kv_transfer_params, fields.PRECOPY: True}
    body = _body(key, tokens, {"max_tokens": 1, "temperature": 0.0}, params, sampling)
    return {**body, "priority": LARGEST_PRIORITY} if background else body


def _body(
    key: str, tokens: list[int], parameters: dict[str, Any], params: dict[str, Any], sampling: Sampling
) -> dict[str, Any]:
    return {
        **({"model": sampling.adapter} if sampling.adapter is not None else {}),
        **({"cache_salt": sampling.cache_salt} if sampling.cache_salt is not None else {}),
        "request_id": key,
        "token_ids": tokens,
        "sampling_params": {"detokenize": False, **parameters},
        fields.KV_TRANSFER_PARAMS: {**params, fields.KEY: key},
    }
