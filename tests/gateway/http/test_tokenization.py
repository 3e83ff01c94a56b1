"""`/tokenize` and `/detokenize`, and the routes that are not offered."""

from typing import Any

import pytest

from tests.gateway.http.service import MODEL, Service, failure


async def post(service: Service, path: str, **body: Any) -> Any:
    return await service.client.post(path, json=body)


async def test_a_text_and_back(shared: Service) -> None:
    reply = (await post(shared, "/tokenize", model=MODEL, prompt="Hé", return_token_strs=True)).json()
    assert reply["tokens"] == shared.gateway.text.encode("Hé")
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) == 3
    assert reply["max_model_len"] == shared.gateway.maximum_model_tokens
    assert (await post(shared, "/detokenize", tokens=reply["tokens"])).json() == {"prompt": "Hé"}


async def test_an_empty_text_has_no_tokens(shared: Service) -> None:
    assert (await post(shared, "/tokenize", prompt="", add_special_tokens=False)).json()["tokens"] == []
    assert (await post(shared, "/tokenize", prompt="")).json()["tokens"] == shared.gateway.text.encode("")


async def test_a_chat_is_the_prompt_that_it_is_generated_from(shared: Service) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    counted = (await post(shared, "/tokenize", messages=messages)).json()
    assert counted["count"] == (await shared.chat(messages=messages)).json()["usage"]["prompt_tokens"]
    assert counted["token_strs"] is None
    without = (await post(shared, "/tokenize", messages=messages, add_generation_prompt=False)).json()
    assert counted["tokens"][:-1] == without["tokens"]
    tool = {"type": "function", "function": {"name": "f"}}
    with_tools = (await post(shared, "/tokenize", messages=messages, tools=[tool])).json()
    assert "[1 tools]" in (await post(shared, "/detokenize", tokens=with_tools["tokens"])).json()["prompt"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_cannot_be_done_is_refused(shared: Service, path: str, body: dict[str, Any], param: str) -> None:
    assert failure(await post(shared, path, **body), 400)["param"] == param


async def test_another_model_is_not_served(shared: Service) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert failure(await post(shared, path, model="other", **body), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/embeddings", "/v1/audio/transcriptions", "/v1/images/generations", "/v1/moderations", "/v1/batches"),
        *("/v1/files", "/v1/assistants", "/v1/fine_tuning/jobs", "/rerank", "/v1/score", "/pooling", "/classify"),
    ],
)
async def test_other_routes_are_refused_by_name(shared: Service, path: str) -> None:
    for method in ("GET", "POST"):
        error = failure(await shared.client.request(method, path), 404)
        assert error["code"] == "not_offered"
        assert error["message"].startswith(f"{path} is not offered")
        assert "/v1/chat/completions" in error["message"]
