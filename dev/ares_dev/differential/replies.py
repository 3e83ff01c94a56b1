"""Replies in the form in which they are compared: without ids and times, streams joined to one reply a choice."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import aiohttp

# Differ between two replies of the same server, or name the server.
_OF_ONE_REPLY = {"id", "created", "created_at", "completed_at", "system_fingerprint"}
# Depend on the requests before.
_OF_ONE_REPLY |= {"prompt_tokens_details", "input_tokens_details"}
_OF_ONE_REPLY |= {"cache_read_input_tokens", "cache_creation_input_tokens"}
# Fields of chunks whose place depends on timing: which chunk brings the end, and whether text comes with it.
_BY_TIMING = {"choice.finish_reason", "choice.stop_reason", "delta.content", "delta.reasoning", "system_fingerprint"}
_JOINED_TEXTS = {"text", "content", "reasoning", "arguments"}
# Logits of a request that is computed alone and of one in a batch differ in their last bits (float32).
_TOLERANCE = 2e-3
# Of a response. vLLM says of each that it is completed, OpenAI and the gateway say where a limit cut it.
_ITEMS = ("message", "reasoning", "function_call")
# What vLLM writes for the logarithm of 0.
_IMPOSSIBLE = -9999.0


@dataclass(slots=True)
class Reply:
    """A status, and the body or the joined stream; `shape` has the fields of each kind of chunk."""

    status: int
    body: Any
    shape: list[str] = field(default_factory=list)


async def send(http: aiohttp.ClientSession, url: str, route: str, body: dict[str, Any]) -> Reply:
    """Send a request to a server and return its reply."""
    async with http.post(url + route, json=body) as reply:
        content = await reply.read()
        if reply.content_type != "text/event-stream":
            return Reply(reply.status, _comparable(json.loads(content)))
    events = [line[6:] for line in content.split(b"\n") if line.startswith(b"data: ")]
    chunks = [json.loads(event) for event in events if event != b"[DONE]"]
    done = bool(events) and events[-1] == b"[DONE]"
    shape = sorted({",".join(sorted(_fields(chunk))) for chunk in chunks})
    return Reply(reply.status, {"done": done, **_joined(chunks)}, shape)


def difference(ours: Reply, theirs: Reply) -> str | None:
    """Return what differs in a line; None where the replies are equal.

    Of errors, the status and the form are compared, and the field that is named where vLLM names one.
    """
    if ours.status != theirs.status:
        sides = (json.dumps(side.body)[:200] for side in (ours, theirs))
        return f"status {ours.status}, not {theirs.status}: {', not '.join(sides)}"
    if ours.status >= 400:
        return _error_differs(ours.body, theirs.body)
    return _differs(ours.body, theirs.body, "") or _differs(ours.shape, theirs.shape, "fields of chunks")


def _error_differs(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    error, expected = ours["error"], theirs["error"]
    if not {"message", "type"} <= error.keys():
        return f"form of the error: {error}"
    named = expected.get("param")
    return None if named is None else _differs(_field(error.get("param")), _field(named), "error.param")


def _field(param: str | None) -> str | None:
    """Return the field of the body of a path such as ``body.messages.0.role``."""
    return None if param is None else param.removeprefix("body.").split(".")[0]


def _comparable(value: Any) -> Any:
    """Return a reply without what differs between two replies of one server, and without null and empty lists.

    vLLM writes its unset fields as null, ours are absent: to clients they are the same.
    """
    if isinstance(value, dict):
        inner = {name: _comparable(one) for name, one in value.items() if name not in _OF_ONE_REPLY}
        if inner.get("type") in _ITEMS:
            inner.pop("status", None)
        return {name: one for name, one in inner.items() if one is not None and one != [] and not _is_impossible(one)}
    if isinstance(value, list):
        return [_comparable(one) for one in value if not _is_impossible(one)]
    return value


def _is_impossible(value: Any) -> bool:
    """Whether it is an alternative that a grammar excludes: which of them are listed is chance."""
    logprob = value.get("logprob") if isinstance(value, dict) else value
    return isinstance(logprob, float) and logprob <= _IMPOSSIBLE


def _fields(chunk: dict[str, Any]) -> set[str]:
    """Return the fields of a chunk that are not null, with those of its choices and their deltas."""
    names = {name for name, value in chunk.items() if value is not None}
    for choice in chunk.get("choices") or []:
        names |= {f"choice.{name}" for name, value in choice.items() if value is not None}
        names |= {f"delta.{name}" for name, value in choice.get("delta", {}).items() if value is not None}
    return names - _BY_TIMING


def _joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one choice for each index, texts and lists joined, and the last usage."""
    choices: dict[int, dict[str, Any]] = {}
    rest: dict[str, Any] = {}
    for chunk in chunks:
        rest |= {name: value for name, value in _comparable(chunk).items() if name != "choices"}
        for choice in chunk.get("choices") or []:
            _join(choices.setdefault(choice["index"], {}), choice)
    return {"choices": [_comparable(choices[index]) for index in sorted(choices)], **rest}


def _join(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        known = into.get(name)
        both = type(known) if type(known) is type(value) else None
        if name == "tool_calls" and value:
            _join_calls(into.setdefault(name, {}), value)
        elif both is list or (both is str and name in _JOINED_TEXTS):
            into[name] = known + value
        elif both is dict:
            _join(into[name], value)
        elif value is not None or name not in into:
            into[name] = dict(value) if isinstance(value, dict) else value


def _join_calls(into: dict[int, Any], calls: list[dict[str, Any]]) -> None:
    for call in calls:
        known = into.setdefault(call["index"], {"function": {}})
        known |= {n: value for n, value in call.items() if n not in {"function", "id"} and value is not None}
        _join(known["function"], call.get("function") or {})


def _differs(ours: Any, theirs: Any, where: str) -> str | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return _fields_differ(ours, theirs, where)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = (_differs(a, b, f"{where}[{n}]") for n, (a, b) in enumerate(zip(ours, theirs, strict=True)))
        return next((found for found in pairs if found), None)
    if isinstance(ours, float) and isinstance(theirs, float):
        equal = math.isclose(ours, theirs, abs_tol=_TOLERANCE)
    else:
        equal = ours == theirs
    return None if equal else f"{where}: {json.dumps(ours)[:160]}, not {json.dumps(theirs)[:160]}"


def _fields_differ(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> str | None:
    if names := sorted(map(str, ours.keys() ^ theirs.keys())):
        sides = ", ".join(f"{name} ({'added' if name in ours else 'missing'})" for name in names)
        return f"{where}: fields {sides}"
    pairs = (_differs(ours[name], theirs[name], f"{where}.{name}") for name in ours)
    return next((found for found in pairs if found), None)
