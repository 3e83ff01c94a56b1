"""The messages of a `/v1/messages` request as messages of a chat, as vLLM 0.32 makes them (anthropic/serving.py)."""

import json
from typing import Any

from ares.gateway.openai.body import BadRequestError

# Claude Code begins its system prompt with it: a hash of each request, which would defeat the prefix cache.
_BILLING = "x-anthropic-billing-header"
_TEXT_ONLY = "the instances are given text alone; put what the model is to know of it into a text block"


def chat_messages(system: Any, messages: list[Any], *, system_first: bool) -> list[dict[str, Any]]:
    """Return the messages of a chat.

    Parameters
    ----------
    system, messages
        The client's.
    system_first
        Join the text of later system messages to that of the first.

    Raises
    ------
    BadRequestError
        A block is of a type that is not offered, or not as its type wants it; `param` is the path to it.
    """
    for number, message in enumerate(messages):
        _check(message, f"messages.{number}")
    texts = [_system_text(system, "system")] if system is not None else []
    later = {number: _system_text(m["content"], f"messages.{number}.content") for number, m in _system(messages)}
    if system_first:
        texts += later.values()
    text = "".join(texts)
    chat: list[dict[str, Any]] = [{"role": "system", "content": text}] if text else []
    for number, message in enumerate(messages):
        if number not in later:
            chat += _converted(message, f"messages.{number}.content")
        elif later[number] and not system_first:
            chat.append({"role": "system", "content": later[number]})
    return chat


def _check(message: Any, path: str) -> None:
    if not isinstance(message, dict):
        raise BadRequestError(f"{path}: a message is an object", path)
    if message.get("role") not in ("user", "assistant", "system"):
        raise BadRequestError(f"{path}.role: should be user, assistant or system", f"{path}.role")
    if not isinstance(message.get("content"), str | list):
        raise BadRequestError(f"{path}.content: should be text, or a list of blocks", f"{path}.content")


def _system(messages: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(number, message) for number, message in enumerate(messages) if message["role"] == "system"]


def _system_text(content: str | list[Any], path: str) -> str:
    texts = [content] if isinstance(content, str) else [_text_of(b, f"{path}.{n}") for n, b in enumerate(content)]
    return "".join(text for text in texts if not text.startswith(_BILLING))


def _text_of(block: Any, path: str) -> str:
    """Return the text of a block that must be one of text."""
    if _kind(block, path) != "text":
        raise _not_taken(block, path)
    return _field(block, "text", path)


def _converted(message: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """Return a message as one of a chat, behind the results of tools in it."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    made: dict[str, Any] = {"role": role}
    for number, block in enumerate(content):
        at = f"{path}.{number}"
        match _kind(block, at), role:
            case "text", _:
                texts.append(_field(block, "text", at))
            case "thinking", "assistant":
                made["reasoning"] = made.get("reasoning", "") + _field(block, "thinking", at)
            case "redacted_thinking", "assistant":
                pass  # nothing that a model here could read
            case "tool_use", "assistant":
                made.setdefault("tool_calls", []).append(_tool_call(block, at))
            case "tool_result", "user":
                results += _tool_results(block, at)
            case _:
                raise _not_taken(block, at)
    texts = [text for text in texts if text]
    if texts:
        made["content"] = texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
    return results if role == "user" and not texts else [*results, made]


def _tool_call(block: dict[str, Any], path: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise BadRequestError(f"{path}.input: should be an object", f"{path}.input")
    function = {"name": _field(block, "name", path), "arguments": json.dumps(given)}
    return {"id": _field(block, "id", path), "type": "function", "function": function}


def _tool_results(block: dict[str, Any], path: str) -> list[dict[str, Any]]:
    call_id, content = _field(block, "tool_use_id", path), block.get("content") or ""
    texts: list[str] = [content] if isinstance(content, str) else []
    tools: list[dict[str, Any]] = []
    if not isinstance(content, str | list):
        raise BadRequestError(f"{path}.content: should be text, or a list of blocks", f"{path}.content")
    for number, part in enumerate([] if isinstance(content, str) else content):
        at = f"{path}.content.{number}"
        if _kind(part, at) == "tool_reference":
            name = part.get("tool_name") or part.get("name")
            tools.append({"type": "tool_reference", "name": name if isinstance(name, str) else ""})
        else:
            texts.append(_text_of(part, at))
    result = {"role": "tool", "tool_call_id": call_id, "content": "\n".join(texts)}
    return [result, *([{**result, "content": tools}] if tools else [])]


def _kind(block: Any, path: str) -> str:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise BadRequestError(f"{path}: a block is an object with a type", path)
    return str(block["type"])


def _not_taken(block: dict[str, Any], path: str) -> BadRequestError:
    return BadRequestError(f"{path}: a block of type {block['type']} is not taken here: {_TEXT_ONLY}", path)


def _field(block: dict[str, Any], name: str, path: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise BadRequestError(f"{path}.{name}: should be text", f"{path}.{name}")
    return value
