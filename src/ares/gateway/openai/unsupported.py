"""Fields of OpenAI's and vLLM's requests that are not offered: they are refused by name, not ignored.

What vLLM 0.32 itself ignores is ignored here too (entrypoints/openai/*/protocol.py): `user`, `session_id`, `store`,
`length_penalty` without a beam, and what is for its render routes only; not so what would change the output.
"""

from typing import Any

from ares.gateway.openai.body import BadRequestError

# `structured_outputs` of earlier versions of vLLM: an output without the structure would be taken for one with it.
_GUIDED = ("guided_choice", "guided_grammar", "guided_json", "guided_regex", "structural_tag")
# With the values that have no effect anyway.
_FIELDS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "cache_salt": (),
    "chat_template": (),
    "echo": (False,),  # of a chat
    "ec_transfer_params": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    **dict.fromkeys(_GUIDED, ()),
    "include_reasoning": (True,),
    "kv_transfer_params": ({},),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": ([], ["text"]),
    "parallel_tool_calls": (True,),
    "prompt_embeds": ([],),
    "prompt_logprobs": (),
    "return_prompt_text": (False,),
    "stream_interval": (1,),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "watermarking": (False,),
    "web_search_options": (),
}
_INSTEAD = {
    "cache_salt": "prefixes are shared by all requests",
    "chat_template": "the chat template is the model's own",
    "function_call": "give tools and tool_choice",
    "functions": "give tools",
    **dict.fromkeys(_GUIDED, "give structured_outputs"),
    "modalities": "the model writes text only",
    "truncate_prompt_tokens": "shorten the prompt",
}


def refuse(fields: dict[str, Any]) -> None:
    """Refuse fields that are not offered.

    Raises
    ------
    BadRequestError
        `param` is the field.
    """
    for name, value in fields.items():
        if name in _FIELDS and value not in _FIELDS[name]:
            instead = f": {_INSTEAD[name]}" if name in _INSTEAD else "; leave it out"
            raise BadRequestError(f"{name} is not offered here{instead}", name)
