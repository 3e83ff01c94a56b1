"""What the integration tests ask of a cluster."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

# KV that is pinned for an instance that has died is kept for a lease of 30 s (ares.engine.launcher.LEASE_S).
IDLE_S = 60.0


@dataclass
class Output:
    """What a stream has brought so far."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: Any = None
    usage: dict[str, int] | None = None
    cached_tokens: int | None = None
    error: dict[str, Any] | None = None
    logprobs: list[Any] = field(default_factory=list)
    done: bool = False
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def reach(self, count: int) -> None:
        """Wait for so many tokens."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: len(self.token_ids) >= count or self.done), 60)


class Client:
    """A client of one gateway; `slow` says that a token takes 10 times as long as on the stock CPU build."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str, *, slow: bool = False) -> None:
        self.http = http
        self.url = url
        self.model = model
        self.slow = slow

    def body(self, prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
        """Return a greedy completion request."""
        base = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return {**base, "return_token_ids": True, **more}

    async def complete(self, prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
        """Return a whole reply."""
        async with self.http.post(f"{self.url}/v1/completions", json=self.body(prompt, tokens, **more)) as reply:
            assert reply.status == 200, await reply.text()
            found: dict[str, Any] = await reply.json()
        details = found["usage"].pop("prompt_tokens_details", {})
        return {**found, "cached_tokens": details.get("cached_tokens")}

    def stream(self, name: str, prompt: Any, tokens: int, **more: Any) -> tuple[Output, "asyncio.Task[Output]"]:
        """Start a stream; the output fills while it runs."""
        body = self.body(prompt, tokens, stream=True, stream_options={"include_usage": True}, **more)
        output = Output()
        return output, asyncio.create_task(self._follow(name, body, output))

    async def _follow(self, name: str, body: dict[str, Any], output: Output) -> Output:
        async with self.http.post(f"{self.url}/v1/completions", json=body, headers={"x-request-id": name}) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    output.done |= line.startswith(b"data: [DONE]")
                    continue
                chunk = json.loads(line[6:])
                output.error = chunk.get("error", output.error)
                if usage := chunk.get("usage"):
                    output.cached_tokens = usage.pop("prompt_tokens_details", {}).get("cached_tokens")
                    output.usage = usage
                for choice in chunk.get("choices", []):
                    output.token_ids += choice["token_ids"]
                    output.text += choice["text"]
                    output.finish_reason = choice["finish_reason"] or output.finish_reason
                    output.stop_reason = choice.get("stop_reason") or output.stop_reason
                    output.logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
                async with output.changed:
                    output.changed.notify_all()
        async with output.changed:
            output.done = True
            output.changed.notify_all()
        return output

    async def status(self) -> dict[str, Any]:
        """Return the admin status."""
        async with self.http.get(f"{self.url}/admin/v1/status") as reply:
            return await reply.json()

    async def row(self, name: str) -> dict[str, Any] | None:
        """Return the status of one request."""
        return next((row for row in (await self.status())["requests"] if row["id"] == name), None)

    async def migrate(self, name: str, target: str, mode: str = "auto") -> tuple[int, dict[str, Any]]:
        """Order a move; return the HTTP status and the body."""
        order = {"request_id": name, "target": target, "mode": mode}
        async with self.http.post(f"{self.url}/admin/v1/migrations", json=order) as reply:
            return reply.status, await reply.json()

    async def move_on(self, name: str, exclude: tuple[str, ...] = (), mode: str = "auto") -> dict[str, Any] | None:
        """Move a request to another decode instance; None where it has ended, or cannot move now."""
        status = await self.status()
        row = next((r for r in status["requests"] if r["id"] == name), None)
        if row is None or not row["movable"]:
            return None
        names = [i["name"] for i in status["instances"] if i["role"] == "decode" and i["healthy"]]
        others = [n for n in names if n != row["instance"] and n not in exclude]
        if not others:  # a busy machine has kept them from answering
            return None
        code, record = await self.migrate(name, others[0], mode)
        return record if code == 200 else None

    async def engine_metric(self, instance: str, name: str) -> float:
        """Return the sum of one of vLLM's own counters on an instance."""
        return await self._metric(
            next(i["url"] for i in (await self.status())["instances"] if i["name"] == instance), name
        )

    async def gateway_metric(self, name: str) -> float:
        """Return the sum of one of the gateway's own counters."""
        return await self._metric(self.url, name)

    async def _metric(self, url: str, name: str) -> float:
        async with self.http.get(f"{url}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    async def quiet(self, within_s: float = IDLE_S) -> None:
        """Wait until nothing runs, waits or is pinned and every KV block is free again."""
        deadline = time.monotonic() + within_s
        while True:
            status = await self.status()
            busy = [
                (i["name"], key, i[key])
                for i in status["instances"]
                if i["healthy"]
                for key in ("running", "waiting", "pinned", "kv_blocks_used", "sessions")
                if i[key]
            ]
            if not busy and not status["requests"]:
                return
            assert time.monotonic() < deadline, f"left behind: {busy} {status['requests']}"
            await asyncio.sleep(0.1)
