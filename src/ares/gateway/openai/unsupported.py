"""Fields of OpenAI's and vLLM's requests that are not offered: they are refused by name, not ignored.

What vLLM 0.32 itself ignores is ignored here too (`WITHOUT_EFFECT`, and all that it does not know, such as `store`);
not so what would change the output or the reply.
"""

from typing import Any

from ares.gateway.openai.body import BadRequestError

WITHOUT_EFFECT = {
    "length_penalty": "of beam search, which is not offered",
    "session_id": "a label in the KV cache events of an instance, which the gateway does not read",
    "user": "vLLM ignores it",
}
"""Fields of vLLM that change nothing here, and why."""

# `structured_outputs` of earlier versions of vLLM: an output without the structure would be taken for one with it.
_GUIDED = (
    *("guided_choice", "guided_grammar", "guided_json", "guided_regex", "guided_decoding_backend"),
    *("guided_whitespace_pattern", "structural_tag"),
)
# With the values that have no effect anyway.
_FIELDS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),  # of a chat
    "ec_transfer_params": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    **dict.fromkeys(_GUIDED, ()),
    "kv_transfer_params": ({},),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_payload": ("tensors",),
    "mm_processor_kwargs": ({},),
    "modalities": ([], ["text"]),
    "prompt_embeds": ([],),
    "prompt_logprobs": (),
    "return_mm_kwargs": (True,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "web_search_options": (),
}
_RENDERING = "it is of vLLM's render routes, which are the instances' own"
_INSTEAD = {
    "echo": "put the message that is to be repeated before the answer yourself",
    "function_call": "give tools and tool_choice",
    "functions": "give tools",
    **dict.fromkeys(_GUIDED, "give structured_outputs"),
    # An instance's token-level reply cuts its list, and vLLM's V1 runner changes the log probabilities of the requests
    # of the same batch (v1/sample/sampler.py, 0.32).
    "logprob_token_ids": "give top_logprobs (in completions: logprobs)",
    "modalities": "the model writes text only",
    "prompt_logprobs": "log probabilities are given for the output only",
    **dict.fromkeys(("mm_payload", "return_mm_kwargs", "return_token_offsets"), _RENDERING),
    "routed_experts_prompt_start": "replies have no routed experts",
}


def refused() -> list[str]:
    """Return the names of the fields that are refused, unless their value asks for nothing."""
    return sorted(_FIELDS)


def instead(name: str) -> str:
    """Return what to do instead of giving a field that is refused."""
    return _INSTEAD.get(name, "leave it out")


def refuse(fields: dict[str, Any]) -> None:
    """Refuse fields that are not offered.

    Raises
    ------
    BadRequestError
        `param` is the field.
    """
    for name, value in fields.items():
        if name in _FIELDS and value not in _FIELDS[name]:
            raise BadRequestError(f"{name} is not offered here: {instead(name)}", name)
