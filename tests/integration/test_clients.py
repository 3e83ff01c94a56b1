"""Clients that people use, unmodified: the official openai package. vLLM's benchmark: tests/engine/simulated."""

import openai
import pytest

from tests.integration.client import Client


async def test_the_official_openai_client(client: Client) -> None:
    api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none")
    assert [model.id async for model in api.models.list()] == [client.model]

    whole = await api.chat.completions.create(
        model=client.model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_completion_tokens=20,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 20
    assert all(len(position.top_logprobs) == 2 for position in logprobs.content)
    assert all(position.logprob <= 0 for position in logprobs.content)

    text, usage, roles = "", None, []
    stream = await api.chat.completions.create(
        model=client.model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_completion_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert text == whole.choices[0].message.content
    assert usage == whole.usage
    assert roles == ["assistant"]

    completion = await api.completions.create(model=client.model, prompt=["one", "two"], max_tokens=5, n=2, echo=True)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in completion.choices] == ["one", "one", "two", "two"]


async def test_openai_errors_are_its_exceptions(client: Client) -> None:
    api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "x"}]
    for arguments, kind in (
        ({"model": "nope"}, openai.NotFoundError),
        ({"model": client.model, "max_tokens": 10**6}, openai.BadRequestError),
    ):
        with pytest.raises(kind) as caught:
            await api.chat.completions.create(messages=messages, **arguments)  # type: ignore[call-overload]
        assert caught.value.body["message"]
