"""The items of a `/v1/responses` request as messages of a chat, as vLLM 0.32 makes them (openai/responses/utils.py)."""

from typing import Any

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.messages import template_part

_KEPT_NOWHERE = {"item_reference": "no item is kept here; give the item itself"}


def chat_messages(instructions: str | None, given: str | list[Any]) -> list[dict[str, Any]]:
    """Return the messages of a chat.

    Reasoning, text and calls of one turn are items of their own, and become one message of the assistant.

    Raises
    ------
    BadRequestError
        An item is of a type that is not offered, or not as its type wants it; `param` is the path to it.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not given:
        raise BadRequestError("input: there are no items", "input")
    for number, item in enumerate(given):
        _add(messages, item, f"input.{number}")
    return messages


def continues_final_message(given: str | list[Any]) -> bool:
    """Whether the last item is a message of the model, or its reasoning, that is not complete."""
    last = given[-1] if isinstance(given, list) and given else None
    if not isinstance(last, dict) or last.get("type", "message") not in ("message", "reasoning"):
        return False
    return last.get("status") in ("in_progress", "incomplete")


def _add(messages: list[dict[str, Any]], item: Any, path: str) -> None:
    if not isinstance(item, dict):
        raise BadRequestError(f"{path}: an item is an object", path)
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        _add_message(messages, item, path)
    elif kind == "reasoning":
        _add_to_assistant(messages, "reasoning", _reasoning(item, path))
    elif kind == "function_call":
        _add_call(messages, item, path)
    elif kind == "function_call_output":
        content = _content(item.get("output"), f"{path}.output")
        messages.append({"role": "tool", "content": content, "tool_call_id": _text(item, "call_id", path)})
    elif isinstance(kind, str):
        instead = _KEPT_NOWHERE.get(
            kind, "give messages, reasoning, and calls of functions (function_call, function_call_output)"
        )
        raise BadRequestError(f"{path}: an item of type {kind} is not taken: {instead}", path)
    else:
        raise BadRequestError(f"{path}.type: an item needs a type, or a role", f"{path}.type")


def _add_message(messages: list[dict[str, Any]], item: dict[str, Any], path: str) -> None:
    role, content = _text(item, "role", path), _content(item.get("content"), f"{path}.content")
    if role != "assistant":
        messages.append({"role": role, "content": content})
        return
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    _add_to_assistant(messages, "content", text)


def _add_to_assistant(messages: list[dict[str, Any]], field: str, text: str) -> None:
    """Set a field of the assistant's last message, or begin another one where it has the field already."""
    if messages and messages[-1]["role"] == "assistant" and messages[-1].get(field) is None:
        messages[-1][field] = text
    else:
        messages.append({"role": "assistant", field: text})


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], path: str) -> None:
    if item.get("namespace"):
        raise BadRequestError(f"{path}.namespace: functions have no namespaces here", f"{path}.namespace")
    function = {"name": _text(item, "name", path), "arguments": _text(item, "arguments", path)}
    call = {"id": _text(item, "call_id", path), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "tool_calls": [call]})


def _reasoning(item: dict[str, Any], path: str) -> str:
    """Return the text of a reasoning item, or else that of its summary."""
    if item.get("encrypted_content"):
        name = f"{path}.encrypted_content"
        raise BadRequestError(f"{name}: encrypted reasoning cannot be read here; give its content", name)
    for field in ("content", "summary"):
        parts = item.get(field) or []
        if not isinstance(parts, list) or not all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts
        ):
            raise BadRequestError(f"{path}.{field}: should be a list of parts with a text", f"{path}.{field}")
        if parts:
            return "".join(part["text"] for part in parts)
    return ""


def _content(given: Any, path: str) -> str | list[dict[str, Any]]:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise BadRequestError(f"{path}: should be text, or a list of parts", path)
    return [template_part(part, f"{path}.{number}") for number, part in enumerate(given)]


def _text(item: dict[str, Any], name: str, path: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise BadRequestError(f"{path}.{name}: should be text", f"{path}.{name}")
    return value
