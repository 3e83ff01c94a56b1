"""The fields of vLLM's requests: each one is honoured, refused by name, or has no effect in vLLM either."""

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as VllmCompletion

from ares.gateway.openai import unsupported
from ares.gateway.openai.requests import ChatRequest, CompletionRequest
from tests.gateway.http.fields import CHAT, COMPLETION, OF_PARSERS


@pytest.mark.parametrize(
    ("theirs", "ours", "cases"),
    [(ChatCompletionRequest, ChatRequest, CHAT), (VllmCompletion, CompletionRequest, COMPLETION)],
    ids=["chat", "completion"],
)
def test_every_field_of_vllm_is_known(theirs: Any, ours: Any, cases: Any) -> None:
    """The cases are what tests/gateway/http/test_fields.py shows an effect of, field by field."""
    honoured = {case.field for case in cases}
    refused = set(unsupported.refused()) - ours.model_fields.keys()
    known = honoured | refused | unsupported.WITHOUT_EFFECT.keys() | OF_PARSERS
    assert theirs.model_fields.keys() - known == set()
    assert not honoured & refused
    own = {"best_of"} if ours is CompletionRequest else set()
    assert ours.model_fields.keys() - known == own
