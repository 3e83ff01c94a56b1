"""The openai package: chats, completions, responses, tools, structured outputs, asynchronous calls, errors."""

import asyncio
from typing import Any, Literal

from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from ares_dev.clients.report import CONVERSATION, FUNCTION, TOOL, Check, Report, Target, expect, main

_CONCURRENT = 4
# Enough for one tool call or one structured output.
_CALL_TOKENS = 64
_RESPONSES_TOOL: Any = {"type": "function", **FUNCTION}
# The conversation in the form of the Responses API.
_INPUT: Any = [
    CONVERSATION[0],
    {"type": "function_call", "call_id": "call_1", **CONVERSATION[1]["tool_calls"][0]["function"]},
    {"type": "function_call_output", "call_id": "call_1", "output": CONVERSATION[2]["content"]},
    *CONVERSATION[3:],
]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    sky: Literal["clear", "cloudy"]


class GetWeather(BaseModel):
    """Get the current weather of a city."""

    city: Literal["Oslo", "Rome"]


class _Session:
    """One client with the arguments of most calls."""

    def __init__(self, target: Target, report: Report) -> None:
        # A retry would hide a failure.
        options: Any = {"base_url": f"{target.url}/v1", "api_key": "none", "max_retries": 0}
        self.api, self.asynchronous = OpenAI(**options), AsyncOpenAI(**options)
        self.model, self.tokens, self.check = target.model, target.tokens, report.check
        self.chat: Any = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Count from one to twenty."}],
            "max_completion_tokens": self.tokens,
        }
        self.question: Any = {
            **self.chat,
            "messages": CONVERSATION,
            "max_completion_tokens": _CALL_TOKENS,
            "temperature": 0,
        }


def _models(session: _Session) -> None:
    with session.check("models.list"):
        expect(session.model in [model.id for model in session.api.models.list()], "the model is not listed")
    with session.check("models.retrieve"):
        expect(session.api.models.retrieve(session.model).id == session.model, "another model")


def _chats(session: _Session) -> None:
    create = session.api.chat.completions.create
    with session.check("chat"):
        whole = create(**session.chat)
        expect(bool(whole.choices[0].message.content), f"no text: {whole}")
        expect(whole.usage is not None and 0 < whole.usage.completion_tokens <= session.tokens, f"usage {whole.usage}")
    with session.check("chat, streamed, with usage"):
        text, usage = "", None
        for chunk in create(**session.chat, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        expect(bool(text) and usage is not None, f"text {text!r}, usage {usage}")
    with session.check("chat, 2 choices, log probabilities"):
        whole = create(**session.chat, n=2, logprobs=True, top_logprobs=2, seed=3)
        expect([choice.index for choice in whole.choices] == [0, 1], f"choices {whole.choices}")
        for choice in whole.choices:
            found = choice.logprobs.content if choice.logprobs else None
            expect(bool(found) and all(len(one.top_logprobs) == 2 for one in found or ()), f"log probabilities {found}")
    with session.check("chat, streamed by the stream helper"):
        with session.api.chat.completions.stream(**session.chat) as stream:
            text = "".join(event.content for event in stream if event.type == "content.done")
        expect(bool(text), "no event content.done with text")
    with session.check("chat, stream closed after one chunk"), create(**session.chat, stream=True) as cut:
        next(iter(cut))
    with session.check("chat, raw reply"):
        raw = session.api.chat.completions.with_raw_response.create(**session.chat)
        expect(bool(raw.headers.get("x-request-id")) and raw.parse().object == "chat.completion", "no x-request-id")


def _completions(session: _Session) -> None:
    create: Any = session.api.completions.create
    common: Any = {"model": session.model, "max_tokens": session.tokens}
    with session.check("completion of 2 prompts, echoed"):
        whole = create(**common, prompt=["one two three", "four five six"], echo=True)
        starts = [choice.text[:3] for choice in whole.choices]
        expect(starts == ["one", "fou"], f"texts {starts}")
    with session.check("completion, streamed"):
        text = "".join(
            choice.text for chunk in create(**common, prompt="one two", stream=True) for choice in chunk.choices
        )
        expect(bool(text), "no text")
    with session.check("completion of token ids"):
        expect(bool(create(**common, prompt=[100, 101, 102]).choices[0].text), "no text")


def _responses(session: _Session) -> None:
    responses = session.api.responses
    plain: Any = {"model": session.model, "input": "Count from one to twenty."}
    asked: Any = {"model": session.model, "input": _INPUT, "tools": [_RESPONSES_TOOL], "temperature": 0}
    with session.check("response"):
        whole = responses.create(**plain, instructions="Be brief.", max_output_tokens=session.tokens, store=False)
        expect(bool(whole.output_text) and whole.usage is not None, f"{whole}")
    with session.check("response, streamed"):
        events = list(responses.create(**plain, max_output_tokens=session.tokens, stream=True))
        expect(events[-1].type in {"response.completed", "response.incomplete"}, f"the last event is {events[-1].type}")
        expect(any(event.type == "response.output_text.delta" for event in events), "no text")
    with session.check("response, parsed output"):
        parsed = responses.parse(**plain, text_format=Weather, max_output_tokens=_CALL_TOKENS)
        expect(isinstance(parsed.output_parsed, Weather), f"output {parsed.output_text!r}")
    for choice in ("auto", "required"):
        with session.check(f"response with a tool, tool_choice {choice}") as check:
            whole = responses.create(**asked, tool_choice=choice, max_output_tokens=_CALL_TOKENS)
            calls = [item for item in whole.output if item.type == "function_call"]
            for call in calls:
                check.called(call.name, call.arguments)
            if not calls:
                check.answered(whole.output_text, forced=choice == "required")


def _check_message(check: Check, message: Any, *, forced: bool) -> None:
    for call in message.tool_calls or ():
        check.called(call.function.name, call.function.arguments)
    if not message.tool_calls:
        check.answered(message.content, forced=forced)


def _tools(session: _Session) -> None:
    create = session.api.chat.completions.create
    named: Any = {"type": "function", "function": {"name": FUNCTION["name"]}}
    choices: dict[str, Any] = {"auto": "auto", "required": "required", "named": named}
    for name, choice in choices.items():
        with session.check(f"chat with a tool, tool_choice {name}") as check:
            whole = create(**session.question, tools=[TOOL], tool_choice=choice)
            _check_message(check, whole.choices[0].message, forced=name != "auto")
        with session.check(f"chat with a tool, streamed, tool_choice {name}") as check:
            with session.api.chat.completions.stream(**session.question, tools=[TOOL], tool_choice=choice) as stream:
                for _ in stream:
                    pass
                message = stream.get_final_completion().choices[0].message
            _check_message(check, message, forced=name != "auto")
    with session.check("chat with the result of a tool"):
        result = {**session.question, "messages": CONVERSATION[:3], "max_completion_tokens": 24}
        answer = create(**result, tools=[TOOL])
        expect(bool(answer.choices[0].message.content or answer.choices[0].message.tool_calls), f"{answer}")


def _structured_outputs(session: _Session) -> None:
    completions = session.api.chat.completions
    with session.check("chat, parsed output"):
        parsed = completions.parse(**session.question, response_format=Weather).choices[0].message
        expect(isinstance(parsed.parsed, Weather), f"output {parsed.content!r}")
    with session.check("chat, parsed arguments of a strict tool") as check:
        strict = completions.parse(
            **session.question, tools=[pydantic_function_tool(GetWeather, name="get_weather")], tool_choice="required"
        )
        calls = strict.choices[0].message.tool_calls or []
        expect(len(calls) == 1, f"{len(calls)} calls: {strict.choices[0].message.content!r}")
        call = calls[0]
        expect(isinstance(call.function.parsed_arguments, GetWeather), f"arguments {call.function.arguments!r}")
        check.called("get_weather", call.function.arguments)


async def _concurrent(session: _Session) -> None:
    async with session.asynchronous as api:

        async def whole(number: int) -> None:
            with session.check(f"asynchronous chat {number}"):
                reply = await api.chat.completions.create(**session.chat)
                expect(bool(reply.choices[0].message.content), f"no text: {reply}")

        async def streamed(number: int) -> None:
            with session.check(f"asynchronous chat {number}, streamed"):
                text = ""
                async for chunk in await api.chat.completions.create(**session.chat, stream=True):
                    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                expect(bool(text), "no text")

        halves = range(_CONCURRENT // 2)
        await asyncio.gather(*(whole(n) for n in halves), *(streamed(n) for n in halves))


def _errors(session: _Session) -> None:
    cases: dict[str, tuple[dict[str, Any], type[Exception]]] = {
        "unknown model": ({"model": "no-such-model"}, NotFoundError),
        "too many tokens": ({"max_completion_tokens": 10**7}, BadRequestError),
    }
    for name, (change, kind) in cases.items():
        with session.check(f"error of {name}"):
            try:
                session.api.chat.completions.create(**{**session.chat, **change})
            except kind:
                continue
            raise AssertionError("no error")


def run(target: Target, report: Report) -> None:
    """Run all checks of this client."""
    session = _Session(target, report)
    for part in (_models, _chats, _completions, _responses, _tools, _structured_outputs, _errors):
        part(session)
    asyncio.run(_concurrent(session))


if __name__ == "__main__":
    main(run)
