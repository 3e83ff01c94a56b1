"""Open WebUI: the requests of its backend replayed, as a running one sent them (open_webui.json).

A server between Open WebUI and a gateway kept them: one chat of its API alone, one with a tool, and one with the tool
chosen by a prompt instead, each with the title, tags and follow-ups that it asks for by itself. The name of the model
is replaced by `MODEL` and its random ids by fixed ones. They are sent by aiohttp, as there.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

from ares_dev.clients.report import Check, Report, Target, expect, main

_DONE = "[DONE]"
# Open WebUI sets no limit for tags and follow-ups; a small model may then write to the end of its context.
_LIMIT = 64


@cache
def recording() -> dict[str, Any]:
    """Return the recorded version and requests."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("open_webui.json").read_text())
    return found


def recorded_version() -> str:
    """Return the version of Open WebUI that was recorded."""
    return str(recording()["version"])


async def _events(lines: Any) -> AsyncIterator[str]:
    async for line in lines:
        text = line.decode().strip()
        if text.startswith("data:"):
            yield text.removeprefix("data:").strip()


async def _streamed(content: Any) -> tuple[str, list[Any], bool]:
    """Return the text, the deltas of tool calls, and whether there was usage."""
    text, usage, done = "", False, False
    calls: list[Any] = []
    async for event in _events(content):
        done = event == _DONE
        if done:
            continue
        chunk = json.loads(event)
        expect("error" not in chunk, f"{chunk}")
        usage = usage or bool(chunk.get("usage"))
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            calls += choice["delta"].get("tool_calls") or []
    expect(done, "the stream has no [DONE]")
    return text, calls, usage


async def _reply(check: Check, response: Any, body: dict[str, Any] | None) -> None:
    if response.status != 200:
        raise AssertionError(f"status {response.status}: {await response.text()}")
    if body is None:
        expect(bool((await response.json())["data"]), "no models")
    elif body["stream"]:
        expect(response.content_type == "text/event-stream", f"content type {response.content_type}")
        text, calls, usage = await _streamed(response.content)
        expect(usage == bool(body.get("stream_options")), f"usage: {usage}")
        if calls:
            check.called(calls[0]["function"]["name"], "".join(call["function"]["arguments"] for call in calls))
        elif body.get("tools"):
            check.tool_call = None if body["messages"][-1]["role"] == "tool" else "answered in text"
        expect(bool(text or calls), "no text")
    else:
        expect(bool((await response.json())["choices"][0]["message"]["content"]), "no text")


async def _replay(target: Target, report: Report) -> None:
    import aiohttp

    async with aiohttp.ClientSession(trust_env=True) as http:
        for request in recording()["requests"]:
            body = request.get("body")
            if body is not None:
                body = {**body, "model": target.model, "max_tokens": min(body.get("max_tokens", _LIMIT), _LIMIT)}
            with report.check(request["name"]) as check:
                # Its `data=` is JSON text, its Content-Type one of the recorded headers.
                data = None if body is None else json.dumps(body)
                url = target.url + request["path"]
                async with http.request(request["method"], url, data=data, headers=request["headers"]) as response:
                    await _reply(check, response, body)


def run(target: Target, report: Report) -> None:
    """Replay each request of the recording."""
    asyncio.run(_replay(target, report))


if __name__ == "__main__":
    main(run)
