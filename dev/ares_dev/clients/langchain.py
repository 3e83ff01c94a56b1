"""LangChain's ChatOpenAI: invoked, streamed and in batches, with tools, and with structured outputs."""

import asyncio
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from ares_dev.clients.report import CONVERSATION, FUNCTION, QUESTION, TOOL, Check, Report, Target, expect, main

_COUNT = "Count from one to twenty."
_CALL_TOKENS = 64


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    sky: Literal["clear", "cloudy"]


def _model(target: Target, tokens: int, **fields: Any) -> Any:
    # A retry would hide a failure.
    return ChatOpenAI(
        model=target.model,
        base_url=f"{target.url}/v1",
        api_key="none",
        max_retries=0,
        stream_usage=True,
        max_tokens=tokens,
        temperature=0,
        **fields,
    )


def _check_message(check: Check, message: Any, *, forced: bool) -> None:
    expect(not message.invalid_tool_calls, f"invalid tool calls {message.invalid_tool_calls}")
    for call in message.tool_calls:
        check.called(call["name"], call["args"])
    if not message.tool_calls:
        check.answered(message.text, forced=forced)


def _plain(target: Target, report: Report) -> None:
    model = _model(target, target.tokens)
    with report.check("invoke"):
        message = model.invoke(_COUNT)
        expect(bool(message.content) and bool(message.usage_metadata), f"{message!r}")
    with report.check("stream"):
        chunks = list(model.stream(_COUNT))
        expect(bool("".join(chunk.content for chunk in chunks)), f"{chunks}")
        expect(any(chunk.usage_metadata for chunk in chunks), "no usage")
    with report.check("batch", requests=2):
        expect(all(message.content for message in model.batch([_COUNT, "Say hello."])), "no text")
    with report.check("asynchronous invoke"):
        expect(bool(asyncio.run(model.ainvoke(_COUNT)).content), "no text")
    with report.check("invoke by the Responses API"):
        message = _model(target, target.tokens, use_responses_api=True).invoke(_COUNT)
        expect(bool(message.text), f"{message!r}")


def _tools(target: Target, report: Report) -> None:
    model = _model(target, _CALL_TOKENS)
    for choice in ("auto", "required", FUNCTION["name"]):
        bound = model.bind_tools([TOOL], tool_choice=choice)
        with report.check(f"invoke with a tool, tool_choice {choice}") as check:
            _check_message(check, bound.invoke(CONVERSATION), forced=choice != "auto")
        with report.check(f"stream with a tool, tool_choice {choice}") as check:
            message = None
            for chunk in bound.stream(CONVERSATION):
                message = chunk if message is None else message + chunk
            _check_message(check, message, forced=choice != "auto")
    with report.check("invoke with the result of a tool"):
        call = {"name": FUNCTION["name"], "args": {"city": "Oslo"}, "id": "call_1"}
        messages = [
            HumanMessage(QUESTION),
            AIMessage("", tool_calls=[call]),
            ToolMessage("4 C and rain", tool_call_id="call_1"),
        ]
        answer = _model(target, 24).bind_tools([TOOL]).invoke(messages)
        expect(bool(answer.content or answer.tool_calls), f"{answer!r}")


def _structured_outputs(target: Target, report: Report) -> None:
    for method in ("json_schema", "function_calling"):
        with report.check(f"structured output by {method}"):
            found = _model(target, _CALL_TOKENS).with_structured_output(Weather, method=method).invoke(QUESTION)
            expect(isinstance(found, Weather), f"output {found!r}")


def run(target: Target, report: Report) -> None:
    """Run all checks of this client."""
    for part in (_plain, _tools, _structured_outputs):
        part(target, report)


if __name__ == "__main__":
    main(run)
