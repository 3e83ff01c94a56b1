"""Replies in OpenAI's form: what a stream says in pieces is what the whole says."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from ares.gateway.openai.replies import DONE, Choice, Envelope, Shown, event, usage
from ares.gateway.openai.text import Detokenizer, TextModel
from ares.gateway.pool.delta import Delta, Logprobs, PositionLogprobs, TokenLogprob

NASTY = 'quote " backslash \\ NUL \0 newline \n tab \t é 日 👩‍👩‍👧 </script> \u2028 \x7f'


def choice(
    text_model: TextModel,
    *,
    chat: bool = True,
    stop: tuple[str, ...] = (),
    logprobs: int | None = None,
    token_ids: bool = False,
    model: str = "some/model",
    **options: Any,
) -> Choice:
    envelope = Envelope("id-1", model, chat, created=1)
    detokenizer = Detokenizer(text_model.tokenizer, [5], stop=stop, texts=text_model.token_texts)
    return Choice(envelope, 0, detokenizer, text_model, logprobs=logprobs, token_ids=token_ids, **options)


def deltas(ids: list[int], *, finish: str = "length", logprobs: int | None = None, size: int = 1) -> list[Delta]:
    made = []
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        content = (
            [
                PositionLogprobs(
                    t, -0.5, [TokenLogprob(t, -0.5), *(TokenLogprob(9 + n, -2.0 - n) for n in range(logprobs))]
                )
                for t in part
            ]
            if logprobs is not None
            else None
        )
        made.append(Delta(token_ids=part, logprobs=Logprobs(content) if content else None))
    made[-1].finish_reason = finish
    return made


def chunks(data: bytes) -> list[dict[str, Any]]:
    """Parse server-sent events; each must be one line of JSON in UTF-8."""
    *events, end = data.split(b"\n\n")
    assert end == b""
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in events)
    return [json.loads(line[6:].decode()) for line in events]


def text_of(parsed: list[dict[str, Any]]) -> str:
    found = [chunk["choices"][0] for chunk in parsed]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in found)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("stop", [(), ("👩‍👧",), ("zzz",)])
def test_the_pieces_are_the_whole(text_model: TextModel, chat: bool, size: int, stop: tuple[str, ...]) -> None:
    ids = text_model.encode(NASTY)
    streamed, collected = choice(text_model, chat=chat, stop=stop), choice(text_model, chat=chat, stop=stop)
    parsed = chunks(streamed.opening() + streamed.stream(deltas(ids, size=size)))
    collected.collect(deltas(ids, size=size))
    whole = collected.whole()
    wanted = NASTY[: NASTY.index(stop[0])] if stop and stop[0] in NASTY else NASTY
    assert text_of(parsed) == wanted
    assert (whole["message"]["content"] if chat else whole["text"]) == wanted
    assert streamed.completion_tokens == collected.completion_tokens
    last = parsed[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == (whole["finish_reason"], whole["stop_reason"])
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in parsed[:-1])


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stop", [(), ("👩‍👧",)])
def test_tokens_alone_make_the_same_chunks(text_model: TextModel, chat: bool, stop: tuple[str, ...]) -> None:
    ids = text_model.encode(NASTY)
    batches, alone = choice(text_model, chat=chat, stop=stop), choice(text_model, chat=chat, stop=stop)
    taken = 0
    for token in ids:
        data = alone.stream_token(token)
        taken += bool(data)
        data = data or alone.stream([Delta(token_ids=[token])])
        assert data == batches.stream([Delta(token_ids=[token])])
        assert (alone.completion_tokens, alone.finish_reason) == (batches.completion_tokens, batches.finish_reason)
    assert bool(taken) == (not stop)


@pytest.mark.parametrize(
    "options",
    [
        {"token_ids": True},
        {"counted_prompt": 3},
        {"shown": Shown(interval=2)},
        {"shown": Shown(only_prompt=True)},
    ],
)
def test_what_shows_more_than_text_takes_no_tokens_alone(text_model: TextModel, options: dict[str, Any]) -> None:
    made = choice(text_model, **options)
    made.stream([Delta(token_ids=text_model.encode("a"))])
    assert not made.stream_token(text_model.encode("b")[0])
    assert made.completion_tokens == 1


def test_the_forms_of_chat_chunks(text_model: TextModel) -> None:
    made = choice(text_model)
    role, *content, finish = chunks(made.opening() + made.stream(deltas(text_model.encode("ab"))))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for chunk in (role, *content, finish):
        assert {k: chunk[k] for k in ("id", "object", "created", "model")} == {
            "id": "id-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "some/model",
        }
    assert content[0]["choices"] == [{"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}]
    assert finish["choices"][0]["finish_reason"] == "length"


def test_the_forms_of_completion_chunks(text_model: TextModel) -> None:
    made = choice(text_model, chat=False)
    assert made.opening() == b""
    first, last = chunks(made.stream(deltas(text_model.encode("ab"), finish="stop")))
    assert first["object"] == last["object"] == "text_completion"
    assert first["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "stop")
    assert text_of(chunks(choice(text_model, chat=False).opening(NASTY))) == NASTY


def test_tokens_without_text_make_no_chunk(text_model: TextModel) -> None:
    made = choice(text_model)
    half = text_model.encode("é")[:1]
    assert made.stream([Delta(token_ids=half)]) == b""
    assert made.stream([Delta(token_ids=[])]) == b""
    assert made.completion_tokens == 1


def test_an_end_without_tokens(text_model: TextModel) -> None:
    made = choice(text_model, stop=("abc",))
    assert chunks(made.stream([Delta(token_ids=text_model.encode("ab"))])) == []
    parsed = chunks(made.stream([Delta(token_ids=None, finish_reason="length")]))
    assert text_of(parsed) == "ab"
    assert parsed[0]["choices"][0]["finish_reason"] == "length"


def test_nothing_after_the_stop_string(text_model: TextModel) -> None:
    ids = text_model.encode("ab.cd")
    for size in (1, 5):
        streamed = choice(text_model, stop=(".",), token_ids=True, logprobs=0)
        collected = choice(text_model, stop=(".",), token_ids=True, logprobs=0)
        parsed = chunks(streamed.stream(deltas(ids, size=size, logprobs=0)))
        collected.collect(deltas(ids, size=size, logprobs=0))
        found = [chunk["choices"][0] for chunk in parsed]
        assert [token for c in found for token in c["token_ids"]] == ids[:3]
        assert collected.whole()["token_ids"] == ids[:3]
        shown = [entry["token"] for c in found if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert shown == [entry["token"] for entry in collected.whole()["logprobs"]["content"]] == ["a", "b", "."]


def test_chat_logprobs(text_model: TextModel) -> None:
    made = choice(text_model, logprobs=2)
    made.collect(deltas(text_model.encode("a"), logprobs=4))
    (entry,) = made.whole()["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("a", -0.5, [97])
    assert [t["logprob"] for t in entry["top_logprobs"]] == [-0.5, -2.0]
    plain = choice(text_model)
    plain.collect(deltas(text_model.encode("a"), logprobs=1))
    assert plain.whole()["logprobs"] is None


def test_completion_logprobs(text_model: TextModel) -> None:
    ids = text_model.encode("abc")
    collected, streamed = (choice(text_model, chat=False, logprobs=1) for _ in range(2))
    collected.collect(deltas(ids, logprobs=1))
    whole = collected.whole()["logprobs"]
    assert whole["tokens"] == ["a", "b", "c"]
    assert whole["token_logprobs"] == [-0.5] * 3
    assert whole["text_offset"] == [0, 1, 2]
    assert [set(top) >= {token} for top, token in zip(whole["top_logprobs"], "abc", strict=True)] == [True] * 3
    parsed = [chunk["choices"][0]["logprobs"] for chunk in chunks(streamed.stream(deltas(ids, logprobs=1)))]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for part in parsed for value in part[name]] == whole[name]


def test_usage() -> None:
    assert usage(3, 4) == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    body = Envelope("i", "m", True, created=1).body([], chunk=True, usage=usage(1, 2))
    (parsed,) = chunks(event(body))
    assert (parsed["choices"], parsed["usage"]["total_tokens"]) == ([], 3)
    assert DONE == b"data: [DONE]\n\n"


@pytest.mark.parametrize("model", ['a"b', "a\0b", "日本", "a\nb"])
def test_any_model_name(text_model: TextModel, model: str) -> None:
    made = choice(text_model, model=model)
    parsed = chunks(made.opening() + made.stream(deltas(text_model.encode("ab"))))
    assert {chunk["model"] for chunk in parsed} == {model}
    assert text_of(parsed) == "ab"


def test_bytes_that_are_no_characters(text_model: TextModel, byte_tokenizer: Tokenizer) -> None:
    half = byte_tokenizer.encode("é").ids[:1]
    made = choice(text_model, logprobs=0)
    made.collect(deltas(half * 3, logprobs=0))
    json.dumps(made.whole())
    assert made.completion_tokens == 3
    assert len(made.whole()["logprobs"]["content"]) == 3


def test_tokens_called_by_their_ids(text_model: TextModel) -> None:
    detokenizers = [Detokenizer(text_model.tokenizer, [5]) for _ in range(2)]
    ids = text_model.encode("ab")
    for chat, detokenizer in zip((True, False), detokenizers, strict=True):
        envelope = Envelope("id-1", "some/model", chat, created=1)
        made = Choice(envelope, 0, detokenizer, text_model, logprobs=1, tokens_as_ids=True)
        made.collect(deltas(ids, logprobs=1))
        logprobs = made.whole()["logprobs"]
        names = [f"token_id:{token}" for token in ids]
        if chat:
            assert [position["token"] for position in logprobs["content"]] == names
            assert logprobs["content"][0]["bytes"] == [97]  # as in vLLM: its own
        else:
            assert logprobs["tokens"] == names
            assert list(logprobs["top_logprobs"][0]) == names[:1]  # the sampled token is the likeliest
