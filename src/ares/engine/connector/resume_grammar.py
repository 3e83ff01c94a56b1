"""The grammar of a resumed request, at the end of the output that other instances generated.

With a reasoning parser a grammar begins where the reasoning ends, which may be in that output or after it. vLLM's own
manager of grammars decides it again, from the same tokens and in the order in which the scheduler asked it when they
were generated: one by one (v1/core/sched/scheduler.py, `update_from_output`; without speculative decoding).
"""

from functools import cached_property
from types import SimpleNamespace
from typing import Any

from ares.engine.vllm_api import StructuredOutputManager


class GrammarReplay:
    """Takes the grammars of resumed requests over their output.

    Parameters
    ----------
    vllm_config
        Names the reasoning parser.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config

    @cached_property
    def _manager(self) -> Any:
        # A second one beside the scheduler's, which connectors cannot reach; it compiles no grammar.
        return StructuredOutputManager(self._vllm_config)

    def accept(self, request: Any, output: list[int]) -> bool:
        """Take the grammar of vLLM's Request over output at the end of its tokens.

        Returns
        -------
        bool
            False where the grammar rejects a token.
        """
        structured = request.structured_output_request
        # What the manager reads of a request, with its tokens as they came.
        seen = SimpleNamespace(
            request_id=request.request_id,
            use_structured_output=True,
            structured_output_request=structured,
            prompt_token_ids=request.prompt_token_ids,
            all_token_ids=list(request.prompt_token_ids),
        )
        for position, token in enumerate(output):
            if structured.reasoning_ended:
                return bool(structured.grammar.accept_tokens(request.request_id, output[position:]))
            seen.all_token_ids.append(token)
            if not self._manager.accept_tokens(seen, [token]):
                return False
        return True
