"""litellm, as a library, by its providers for OpenAI-compatible servers and for vLLM."""

import asyncio
import json
from typing import Any

import litellm

from ares_dev.clients.report import CONVERSATION, FUNCTION, TOOL, Report, Target, expect, main

_COUNT = [{"role": "user", "content": "Count from one to twenty."}]
_CALL_TOKENS = 64
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def _plain(common: dict[str, Any], tokens: int, provider: str, report: Report) -> None:
    with report.check(f"{provider}: completion"):
        whole = litellm.completion(**common, messages=_COUNT, max_tokens=tokens)
        expect(bool(whole.choices[0].message.content) and whole.usage.completion_tokens > 0, f"{whole}")
    with report.check(f"{provider}: completion, streamed, with usage"):
        stream = litellm.completion(
            **common, messages=_COUNT, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
        )
        whole = litellm.stream_chunk_builder(list(stream), messages=_COUNT)
        expect(bool(whole.choices[0].message.content) and whole.usage.completion_tokens > 0, f"{whole}")
    with report.check(f"{provider}: asynchronous completion"):
        whole = asyncio.run(litellm.acompletion(**common, messages=_COUNT, max_tokens=tokens))
        expect(bool(whole.choices[0].message.content), f"{whole}")


def _tools(common: dict[str, Any], provider: str, report: Report) -> None:
    asked = {**common, "messages": CONVERSATION, "max_tokens": _CALL_TOKENS, "tools": [TOOL]}
    named = {"type": "function", "function": {"name": FUNCTION["name"]}}
    choices: dict[str, Any] = {"auto": "auto", "required": "required", "named": named}
    for name, choice in choices.items():
        for stream in (False, True):
            how = ", streamed" if stream else ""
            with report.check(f"{provider}: completion with a tool{how}, tool_choice {name}") as check:
                whole = litellm.completion(**asked, temperature=0, tool_choice=choice, stream=stream)
                if stream:
                    whole = litellm.stream_chunk_builder(list(whole), messages=asked["messages"])
                message = whole.choices[0].message
                for call in message.tool_calls or ():
                    check.called(call.function.name, call.function.arguments)
                if not message.tool_calls:
                    check.answered(message.content, forced=name != "auto")


def _other(common: dict[str, Any], tokens: int, provider: str, report: Report) -> None:
    with report.check(f"{provider}: structured output"):
        schema = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": _SCHEMA}}
        whole = litellm.completion(**common, messages=_COUNT, max_tokens=_CALL_TOKENS, response_format=schema)
        text = whole.choices[0].message.content
        expect(json.loads(text)["city"] in {"Oslo", "Rome"}, f"output {text!r}")
    with report.check(f"{provider}: text completion"):
        whole = litellm.text_completion(**common, prompt="one two three", max_tokens=tokens)
        expect(bool(whole.choices[0].text), f"{whole}")
    with report.check(f"{provider}: response"):
        whole = litellm.responses(**common, input="Say hello.", max_output_tokens=tokens)
        expect(bool(whole.output), f"{whole}")


def run(target: Target, report: Report) -> None:
    """Run all checks of this client."""
    for provider in ("openai", "hosted_vllm"):
        # A retry would hide a failure.
        common = {
            "model": f"{provider}/{target.model}",
            "api_base": f"{target.url}/v1",
            "api_key": "none",
            "max_retries": 0,
        }
        _plain(common, target.tokens, provider, report)
        _tools(common, provider, report)
        _other(common, target.tokens, provider, report)


if __name__ == "__main__":
    main(run)
