"""Messages and tools as chat templates get them; tests/engine/test_rendering.py compares them with vLLM's."""

from typing import Any

import pytest

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.messages import Message, Tool, conversation, without_developer


def made(*messages: dict[str, Any], parts: bool = False) -> list[dict[str, Any]]:
    return conversation([Message.model_validate(message) for message in messages], parts=parts)


def called(arguments: Any) -> Any:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return made(message)[0]["tool_calls"][0]["function"]["arguments"]


def test_content_is_text_or_parts() -> None:
    texts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, "b", {"type": "text", "text": ""}]
    message = {"role": "user", "content": texts}
    assert made(message) == [{"role": "user", "content": "a\nb"}]
    assert made(message, parts=True)[0]["content"] == [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b"},
        {"type": "text", "text": ""},
    ]
    assert made({"role": "user", "content": "a"}, parts=True)[0]["content"] == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
def test_no_content_is_no_text(role: str, content: dict[str, Any]) -> None:
    assert made({"role": role, **content})[0]["content"] == ""
    assert not made({"role": role, **content}, parts=True)[0]["content"]


MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image", "image_embeds", "image_pil"), "images"),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), "audio"),
    **dict.fromkeys(("video_url", "input_video", "video", "video_embeds"), "video"),
    **dict.fromkeys(("file", "input_file"), "files"),
    "prompt_embeds": "embeddings",
}


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kind", [*MEDIA, "nonsense"])
def test_a_part_that_is_no_text_is_named(kind: str, parts: bool) -> None:
    with pytest.raises(BadRequestError, match=f"type {kind} is not taken") as wrong:
        made(
            {"role": "user", "content": "a"},
            {"role": "user", "content": ["a", {"type": kind, kind: {"url": "x"}}]},
            parts=parts,
        )
    assert wrong.value.param == "messages.1.content.1"
    if kind in MEDIA:
        assert f"({MEDIA[kind]})" in str(wrong.value)
        assert "text part" in str(wrong.value)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kind", [{"type": "text", "text": "a"}, {}], ids=["in a text part", "without a type"])
@pytest.mark.parametrize("field", MEDIA)
def test_media_are_not_dropped_from_a_part_of_another_type(field: str, kind: dict[str, Any], parts: bool) -> None:
    with pytest.raises(BadRequestError, match=rf"\.{field} is not taken") as wrong:
        made({"role": "user", "content": [{**kind, field: "x"}]}, parts=parts)
    assert wrong.value.param == f"messages.0.content.0.{field}"
    text = {"type": "text", "text": "a", field: None}
    assert made({"role": "user", "content": [text]}, parts=True)[0]["content"] == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("part", "param"),
    [
        (5, "0"),
        (None, "0"),
        ({}, "0.type"),
        ({"type": ["text"]}, "0.type"),
        ({"type": "text"}, "0.text"),
        ({"type": "text", "text": None}, "0.text"),
        ({"type": "refusal", "text": "a"}, "0.refusal"),
    ],
)
def test_a_broken_part_is_named(part: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as wrong:
        made({"role": "user", "content": [part]})
    assert wrong.value.param == f"messages.0.content.{param}"


def test_arguments_of_calls_are_objects() -> None:
    assert called('{"city": "Oslo", "days": [1, null]}') == {"city": "Oslo", "days": [1, None]}
    assert called({"city": "Oslo"}) == {"city": "Oslo"}
    for nothing in ("", None, "{}"):
        assert called(nothing) == {}
    for wrong in ("[]", "5", "{", "[" * 100_000, "1" * 5000):
        assert called(wrong) == {}


def test_calls_that_are_none() -> None:
    for nothing in ([], None):
        assert "tool_calls" not in made({"role": "assistant", "content": "a", "tool_calls": nothing})[0]
    assert "tool_calls" not in made({"role": "user", "tool_calls": [{"function": {"name": "f"}}]})[0]


@pytest.mark.parametrize("field", ["function_call", "audio", "images", "videos", "files"])
def test_what_no_template_gets_is_refused(field: str) -> None:
    with pytest.raises(BadRequestError) as wrong:
        made({"role": "assistant", field: {"id": "x"}})
    assert wrong.value.param == f"messages.0.{field}"
    for nothing in (None, []):
        assert made({"role": "assistant", "content": "a", field: nothing, "annotations": []}) == [
            {"role": "assistant", "content": "a"}
        ]


def test_developer_is_system_where_a_template_has_no_place_for_it() -> None:
    user, developer = {"role": "user", "content": "u"}, {"role": "developer", "content": "d"}
    assert without_developer(made(developer, user)) == [{"role": "system", "content": "d"}, user]
    merged = [{"role": "system", "content": "s\n\nd"}, user]
    assert without_developer(made({"role": "system", "content": "s"}, user, developer)) == merged
    assert without_developer(made(user, developer, parts=True))[0] == {"role": "system", "content": "d"}
    other = made(user, {"role": "system", "content": "s"})
    assert without_developer(other) is other


def test_tools_have_all_their_fields() -> None:
    tool = Tool.model_validate({"function": {"parameters": {"default": None}, "name": "f", "more": 1}})
    function = {"name": "f", "description": None, "parameters": {"default": None}}
    assert tool.rendered() == {"type": "function", "function": function}
    tool = Tool.model_validate({"function": {"name": "f", "strict": True}, "defer_loading": False})
    function = {"name": "f", "description": None, "parameters": None, "strict": True, "defer_loading": False}
    assert tool.rendered() == {"type": "function", "function": function, "defer_loading": False}
