"""Chats and completions over a real server: whole, streamed, several at once."""

from typing import Any

import pytest
from tokenizers import Tokenizer

from ares.gateway.openai.messages import FunctionDefinition, Message
from ares.gateway.openai.requests import ChatRequest, CompletionRequest
from tests.gateway.fakes import expected
from tests.gateway.http.service import MODEL, PROMPT, Service, content_parts, events, failure, sample, tool_call_message
from tests.gateway.running import VOCABULARY


async def test_a_completion(service: Service, byte_tokenizer: Tokenizer) -> None:
    reply = await service.complete()
    assert reply.status_code == 200
    body = reply.json()
    choice = body["choices"][0]
    tokens = expected(PROMPT, 20, vocabulary=VOCABULARY)
    assert choice["token_ids"] == tokens
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}
    assert (body["object"], body["model"], choice["finish_reason"]) == ("text_completion", MODEL, "length")
    assert choice["text"] in byte_tokenizer.decode(PROMPT + tokens)
    assert sample(service, "ares_requests_total", route="completions", outcome="completed") == 1
    assert sample(service, "ares_output_tokens_total") == 20
    assert sample(service, "ares_prompt_tokens_total") == 5


async def test_a_streamed_completion_equals_the_whole(shared: Service) -> None:
    whole = (await shared.complete()).json()
    reply = await shared.complete(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(reply.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [i for choice in choices for i in choice["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_a_streamed_chat_equals_the_whole(shared: Service) -> None:
    whole = (await shared.chat()).json()
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["role"] == "assistant"
    chunks = events((await shared.chat(stream=True)).text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert content == whole["choices"][0]["message"]["content"]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert not any("usage" in chunk for chunk in chunks)


async def test_several_prompts_and_choices(shared: Service) -> None:
    prompts = [[10, 20, 30], [11, 21, 31, 41]]
    body = (await shared.complete(prompt=prompts, n=2, max_tokens=7)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    wanted = [expected(prompt, 7, vocabulary=VOCABULARY) for prompt in prompts for _ in range(2)]
    assert [choice["token_ids"] for choice in body["choices"]] == wanted
    # A prompt counts once, however many choices it has.
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 28, "total_tokens": 35}
    chunks = events((await shared.complete(prompt=prompts, n=2, max_tokens=7, stream=True)).text)
    for index, tokens in enumerate(wanted):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [i for choice in mine for i in choice["token_ids"]] == tokens
        assert mine[-1]["finish_reason"] == "length"


async def test_each_choice_has_a_seed_of_its_own(service: Service) -> None:
    await service.complete(n=3, seed=5)
    bodies = [body for fake in service.fakes[1:] for body in fake.asked]
    assert sorted(body["sampling_params"]["seed"] for body in bodies) == [5, 6, 7]


async def test_one_failed_choice_ends_the_others(service: Service) -> None:
    service.fakes[2].faults.refuse = 400
    error = failure(await service.complete(n=4, max_tokens=2000), 400)
    assert "decode-1 refuses" in error["message"]
    await service.quiet()


async def test_a_stop_string(service: Service, byte_tokenizer: Tokenizer) -> None:
    text = (await service.complete(max_tokens=60)).json()["choices"][0]["text"]
    pairs = [text[n : n + 2] for n in range(40)]
    stop = next(pair for n, pair in enumerate(pairs) if n > 9 and pairs.index(pair) == n and "\ufffd" not in pair)
    whole = (await service.complete(max_tokens=2000, stop=[stop])).json()
    choice = whole["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"] < 60
    reply = await service.complete(max_tokens=2000, stop=[stop], stream=True, stream_options={"include_usage": True})
    *chunks, last = events(reply.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
    assert last["usage"] == whole["usage"]
    await service.quiet()


async def test_the_echo_of_a_prompt(shared: Service) -> None:
    body = (await shared.complete(prompt="Hello", echo=True, return_token_ids=False)).json()
    assert body["choices"][0]["text"].startswith("Hello")
    chunks = events((await shared.complete(prompt="Hello", echo=True, stream=True, return_token_ids=False)).text)
    assert chunks[0]["choices"][0]["text"] == "Hello"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["choices"][0]["text"]


async def test_chat_templates_and_tools(service: Service) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    await service.chat(messages=[{"role": "user", "content": "é"}], tools=tools, tool_choice="none")
    shown = service.gateway.text.decode(service.fakes[0].asked[-1]["token_ids"])
    assert shown == "<s>é</s>[1 tools]<s>"
    await service.chat(tools=tools, tool_choice="none", add_generation_prompt=False)
    assert service.gateway.text.decode(service.fakes[0].asked[-1]["token_ids"]) == "<s>Hi</s>[1 tools]"


@pytest.mark.parametrize(
    ("choice", "needed"),
    [
        ({}, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'),
        ({"tool_choice": "auto"}, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'),
        ({"tool_choice": "required"}, 'tool_choice="required" requires --tool-call-parser'),
        ({"tool_choice": {"function": {"name": "f"}}}, 'tool_choice=function "f" requires --tool-call-parser'),
    ],
)
async def test_calling_tools_needs_a_parser(shared: Service, choice: dict[str, Any], needed: str) -> None:
    reply = await shared.chat(tools=[{"type": "function", "function": {"name": "f"}}], **choice)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "tool_choice"
    assert error["message"].startswith(needed)


async def test_hiding_reasoning_needs_a_parser(shared: Service) -> None:
    reply = await shared.chat(include_reasoning=False)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "include_reasoning"


async def test_the_models_sampling_defaults_apply(service: Service) -> None:
    await service.complete(temperature=0.25)
    asked = service.fakes[0].asked[-1]["sampling_params"]
    assert (asked["top_p"], asked["temperature"]) == (0.9, 0.25)
    await service.complete(top_p=0.5)
    assert service.fakes[0].asked[-1]["sampling_params"]["top_p"] == 0.5


async def rendered(service: Service, **body: Any) -> str:
    """The prompt of a chat."""
    before = [len(fake.asked) for fake in service.fakes]
    reply = await service.chat(max_tokens=2, **body)
    assert reply.status_code == 200, reply.text
    fake, start = next((f, n) for f, n in zip(service.fakes, before, strict=True) if len(f.asked) > n)
    return service.gateway.text.decode(fake.asked[start]["token_ids"])


async def test_messages_of_stock_clients(shared: Service) -> None:
    text = {"type": "text", "text": "Is it"}
    assert (
        await rendered(shared, messages=[content_parts(text, {"type": "text", "text": "cold?"})])
        == "<s>Is it\ncold?</s><s>"
    )
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for content in ({}, {"content": None}, {"content": ""}):
        turns = [
            content_parts(text),
            tool_call_message(call) | content,
            {"role": "tool", "tool_call_id": "c", "content": [text]},
        ]
        assert await rendered(shared, messages=turns) == "<s>Is it</s><s></s><s>Is it</s><s>"
    turns = [{"role": "developer", "content": "Be brief."}, content_parts(text)]
    assert await rendered(shared, messages=turns) == "<s>Be brief.</s><s>Is it</s><s>"
    turns = [content_parts(text), {"role": "assistant", "content": "No, it"}]
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    assert await rendered(shared, messages=turns, **continued) == "<s>Is it</s><s>No, it"


_NULLABLE = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "user", "cache_salt"} - {"messages"})


async def test_null_is_absent(shared: Service) -> None:
    nulls = dict.fromkeys(_NULLABLE) | {"max_tokens": 2}
    for stream in ({}, {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": None}}):
        message = dict.fromkeys(Message.model_fields) | {"role": "user", "content": "Hi"}
        tool = {"type": None, "function": dict.fromkeys(FunctionDefinition.model_fields) | {"name": "f"}}
        tools = {"tools": [tool], "tool_choice": "none"}
        reply = await shared.chat(**nulls | {"messages": [message]} | tools | stream)
        assert reply.status_code == 200, reply.text
        reply = await shared.complete(**nulls | {"prompt": "Hi"} | stream)
        assert reply.status_code == 200, reply.text
    assert (await shared.complete(max_tokens=None)).json()["usage"]["completion_tokens"] == 16


async def test_usage_in_every_chunk(shared: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for ask in (shared.chat, shared.complete):
        *chunks, last = events((await ask(stream=True, stream_options=options, n=2)).text)
        counts = [[c["usage"]["completion_tokens"] for c in chunks if c["choices"][0]["index"] == n] for n in (0, 1)]
        assert all(found == sorted(found) and found[-1] == 20 for found in counts)
        assert {chunk["usage"]["prompt_tokens"] for chunk in [*chunks, last]} == {last["usage"]["prompt_tokens"]}
        assert last["usage"]["completion_tokens"] == 40
    *chunks, last = events((await shared.complete(stream=True, stream_options=options | {"include_usage": False})).text)
    assert not any("usage" in chunk for chunk in [*chunks, last])


async def test_a_request_names_itself_in_its_body_too(shared: Service) -> None:
    assert (await shared.complete(request_id="mine")).headers["x-request-id"] == "mine"
