"""What a chat template makes of requests that Anthropic's API allows: found by rendering, as vLLM 0.32 does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.requests import ChatRequest
from ares.gateway.openai.text import TemplateError

Render = Callable[[ChatRequest], Any]
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What requests are adapted to.

    Attributes
    ----------
    system_first
        Whether the template takes a system message as the first one only.
    disabled_thinking
        The reasoning effort for thinking of type `disabled`: `none`, or `low` where the template knows no `none`.
    """

    system_first: bool
    disabled_thinking: str


def traits(render: Render) -> TemplateTraits:
    """Find the traits of a model's template.

    Parameters
    ----------
    render
        Returns the prompt of a chat, or raises TemplateError or BadRequestError.
    """
    turns = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
    with_tools = {"tools": [_TOOL], "tool_choice": "auto"}
    refused = any(_prompt(render, {"messages": turns, **more}) is None for more in ({}, with_tools))
    greeting = {"messages": [{"role": "user", "content": "Hi"}]}
    none = _prompt(render, {**greeting, "reasoning_effort": "none"})
    known = none is not None and all(_prompt(render, {**greeting, "reasoning_effort": e}) != none for e in _EFFORTS)
    return TemplateTraits(refused, "none" if known else "low")


def _prompt(render: Render, body: dict[str, Any]) -> Any:
    try:
        return render(ChatRequest.of(body))
    except (TemplateError, BadRequestError):
        return None
