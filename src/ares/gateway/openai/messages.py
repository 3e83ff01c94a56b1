"""The messages and tools of a chat: which are accepted, and how a chat template gets them.

As vLLM 0.32 does it (renderers/chat_utils.py, renderers/hf.py): the same messages make the same prompt.
"""

import json
import logging
from typing import Any, Literal

from ares.gateway.openai.body import BadRequestError, Body, Listed

logger = logging.getLogger(__name__)

# The kinds of parts that are text, and the field that holds it.
_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
    "tool_reference": "name",
}
# Fields of parts that hold other than text, and what; they are the types of such parts, too. The instances are given
# token ids alone, so nothing of it would reach the model, whatever its template renders for it.
_MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image", "image_embeds", "image_pil"), "images"),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), "audio"),
    **dict.fromkeys(("video_url", "input_video", "video", "video_embeds"), "video"),
    **dict.fromkeys(("file", "input_file"), "files"),
    "prompt_embeds": "embeddings",
}
_TEXT_ONLY = "the instances are given text alone; put what the model is to know of it into a text part"
# Fields of parts that a template does not get; it gets unknown ones.
_PART_FIELDS = {"closed", "data", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid"}
# Fields of messages that would be lost: no template gets them.
_NOT_TAKEN = {"function_call": "give tool_calls", **dict.fromkeys(("audio", "images", "videos", "files"), _TEXT_ONLY)}


class FunctionCall(Body):
    """The function that was called, with its arguments, as the JSON text of an object or as an object."""

    name: str
    arguments: str | dict[str, Any] | None = None

    def rendered(self) -> dict[str, Any]:
        """Return what a template gets: arguments are an object."""
        return {"arguments": self._parsed(), "name": self.name, **(self.model_extra or {})}

    def _parsed(self) -> dict[str, Any]:
        if not isinstance(self.arguments, str):
            return self.arguments or {}
        try:
            parsed = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            return parsed
        # The call is history: to refuse it would refuse every later turn of the conversation too.
        logger.warning("the arguments of a tool call are not a JSON object; the template is given none")
        return {}


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def rendered(self) -> dict[str, Any]:
        """Return what a template gets."""
        named = {} if self.id is None else {"id": self.id}
        return {**named, "function": self.function.rendered(), "type": self.type, **(self.model_extra or {})}


class Message(Body):
    """A message; its content is text, or a list of parts that are text."""

    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: Listed[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tools: Listed[dict[str, Any]] | None = None
    task: str | None = None


class FunctionDefinition(Body):
    """What a function is for, and the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition
    defer_loading: bool | None = None

    def rendered(self) -> dict[str, Any]:
        """Return what a template gets."""
        function: dict[str, Any] = {
            "name": self.function.name,
            "description": self.function.description,
            "parameters": self.function.parameters,
        }
        if self.function.strict is not None:
            function["strict"] = self.function.strict
        own = self.function.defer_loading
        deferred = {} if self.defer_loading is None else {"defer_loading": self.defer_loading}
        function |= deferred if own is None else {"defer_loading": own}
        return {"type": self.type, "function": function, **deferred}


def conversation(messages: list[Message], *, parts: bool) -> list[dict[str, Any]]:
    """Return the messages as a chat template gets them.

    Parameters
    ----------
    messages
        The client's.
    parts
        Whether the template takes lists of parts (`templates.takes_parts`); otherwise parts are joined by newlines.

    Raises
    ------
    BadRequestError
        A part is no text, or a message has what no template gets; `param` is the path to it.
    """
    return [_rendered(message, f"messages.{number}", parts=parts) for number, message in enumerate(messages)]


def without_developer(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation for a template without the role `developer`: it is `system`, in one first message."""
    if all(message["role"] != "developer" for message in chat):
        return chat
    chat = [_as_system(message) if message["role"] == "developer" else message for message in chat]
    system = [message for message in chat if message["role"] == "system"]
    if system == chat[:1]:
        return chat
    text = "\n\n".join(filter(None, (_joined(message["content"]) for message in system)))
    return [{"role": "system", "content": text}, *(message for message in chat if message["role"] != "system")]


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _rendered(message: Message, path: str, *, parts: bool) -> dict[str, Any]:
    given = message.model_extra or {}
    for name in [name for name in _NOT_TAKEN if given.get(name)]:
        raise BadRequestError(f"{path}.{name} is not taken: {_NOT_TAKEN[name]}", f"{path}.{name}")
    rendered: dict[str, Any] = {"role": message.role, "content": _content(message, f"{path}.content", parts=parts)}
    if message.role == "assistant":
        if message.tool_calls:
            rendered["tool_calls"] = [call.rendered() for call in message.tool_calls]
        reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
        if reasoning is not None:
            rendered |= {"reasoning": reasoning, "reasoning_content": reasoning}
    elif message.role == "tool" and message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    for name in ("name", "task"):
        if (value := getattr(message, name)) is not None:
            rendered[name] = value
    if message.role == "developer":
        rendered["tools"] = message.tools
    return rendered


def _content(message: Message, path: str, *, parts: bool) -> str | list[dict[str, Any]]:
    given = [message.content] if isinstance(message.content, str) else message.content or []
    content = [template_part(part, f"{path}.{number}") for number, part in enumerate(given)]
    if not parts:
        return "\n".join(text for part in content if (text := part.get("text", part.get("name"))))
    # Templates take the answer of a tool as text, unless it names tools.
    if message.role == "tool" and all(part["type"] == "text" for part in content):
        return _joined(content)
    return content


def template_part(part: Any, path: str) -> dict[str, Any]:
    """Return a part of a message as the templates that take parts get it; BadRequestError where it is no text."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise BadRequestError(f"{path}: a part is text or an object", path)
    kind = part.get("type")
    _refuse_media(part, path)
    if not isinstance(kind, str):
        raise BadRequestError(f"{path}.type: a part needs a type, such as text", f"{path}.type")
    if kind not in _TEXT_FIELDS:
        taken = ", ".join(_TEXT_FIELDS)
        raise BadRequestError(f"{path}: a part of type {kind} is not taken, only text ({taken})", path)
    text = part.get(_TEXT_FIELDS[kind])
    if not isinstance(text, str):
        raise BadRequestError(f"{path}.{_TEXT_FIELDS[kind]}: should be text", f"{path}.{_TEXT_FIELDS[kind]}")
    if kind == "tool_reference":
        return {"type": kind, "name": text}
    dropped = _PART_FIELDS | _MEDIA.keys()  # media that are null
    return {"type": "text", "text": text, **{name: value for name, value in part.items() if name not in dropped}}


def _refuse_media(part: dict[str, Any], path: str) -> None:
    """Refuse a part that is no text by its type, or by a field of another type in a part without one or of text."""
    kind = part.get("type")
    if isinstance(kind, str) and kind in _MEDIA:
        raise BadRequestError(f"{path}: a part of type {kind} is not taken ({_MEDIA[kind]}): {_TEXT_ONLY}", path)
    for name in [name for name in _MEDIA if part.get(name) is not None]:
        raise BadRequestError(f"{path}.{name} is not taken ({_MEDIA[name]}): {_TEXT_ONLY}", f"{path}.{name}")


def _joined(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)
