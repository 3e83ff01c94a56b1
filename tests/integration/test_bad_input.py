"""Bad requests get a clear 4xx in OpenAI's form from the real thing, and leave nothing behind."""

from typing import Any

import pytest

from tests.integration.client import Client

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
CASES: list[tuple[str, str, Any, int, str]] = [
    ("malformed JSON", "/v1/completions", b'{"prompt": ', 400, "JSON"),
    ("no object", "/v1/completions", b"[]", 400, ""),
    ("unknown model", "/v1/completions", {"model": "nope", "prompt": "x"}, 404, "nope"),
    ("no prompt", "/v1/completions", {}, 400, "prompt"),
    ("empty prompt", "/v1/completions", {"prompt": []}, 400, "prompt"),
    ("wrong prompt type", "/v1/completions", {"prompt": 5}, 400, "prompt"),
    ("token ids out of range", "/v1/completions", {"prompt": [10**9]}, 400, "token ids"),
    ("negative token ids", "/v1/completions", {"prompt": [-4]}, 400, "token ids"),
    ("prompt too long", "/v1/completions", {"prompt": [5] * 5000}, 400, "5000 tokens"),
    ("negative max_tokens", "/v1/completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    ("zero max_tokens", "/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("huge max_tokens", "/v1/completions", {"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens"),
    ("max_tokens beyond the model", "/v1/completions", {"prompt": "x", "max_tokens": 4097}, 400, "max_tokens"),
    ("wrong type", "/v1/completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ("temperature out of range", "/v1/completions", {"prompt": "x", "temperature": 9}, 400, "temperature"),
    ("bad top_p", "/v1/completions", {"prompt": "x", "top_p": 0}, 400, "top_p"),
    ("too many choices", "/v1/completions", {"prompt": "x", "n": 100000}, 400, "n"),
    ("no messages", "/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("messages of the wrong form", "/v1/chat/completions", {"messages": ["hi"]}, 400, "messages"),
    ("message without role", "/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, ""),
    (
        "bad response_format",
        "/v1/chat/completions",
        {**CHAT, "response_format": {"type": "xml"}},
        400,
        "response_format.type",
    ),
    (
        "a grammar that does not compile",
        "/v1/completions",
        {"prompt": "x", "structured_outputs": {"regex": "("}},
        400,
        "",
    ),
    ("unknown structured output", "/v1/completions", {"prompt": "x", "structured_outputs": {"nope": 1}}, 400, ""),
    ("bad logit bias", "/v1/completions", {"prompt": "x", "logit_bias": {"999999": 1}}, 400, ""),
    ("unknown route", "/v1/nothing", {}, 404, "/v1/nothing"),
    ("a migration without a target", "/admin/v1/migrations", {"request_id": "x"}, 400, "target"),
    ("a migration of nobody", "/admin/v1/migrations", {"request_id": "x", "target": "decode-0"}, 404, "x"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
async def test_is_refused_clearly(client: Client, path: str, body: Any, status: int, words: str) -> None:
    sent = {"data": body} if isinstance(body, bytes) else {"json": body}
    async with client.http.post(f"{client.url}{path}", headers={"Content-Type": "application/json"}, **sent) as reply:
        answer = await reply.json()
        assert reply.status == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"] or words == error["param"]


async def test_a_refused_stream_is_an_error_not_an_empty_stream(client: Client) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 10, "logit_bias": {"999999": 1}}
    async with client.http.post(f"{client.url}/v1/completions", json=body) as reply:
        text = await reply.text()
    assert "error" in text
    assert "logit_bias" in text
