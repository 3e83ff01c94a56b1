"""Parsed chats over HTTP that move between instances while they are streamed: their deltas are those without a move."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from ares.config import GatewayConfig
from ares.gateway.http import app as application
from ares.gateway.http.responses import DirectSend
from ares.gateway.service import Gateway
from ares.parsers.loading import load
from tests.gateway.fakes import FakeInstance, free_port, instances
from tests.gateway.http.service import MODEL, Server
from tests.parsers import ours
from tests.parsers.models import TOOLS, folder, ids, tokenizer
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(240)
FLAGS: dict[str, Any] = {
    "reasoning_parser": "qwen3",
    "tool_call_parser": "hermes",
    "enable_auto_tool_choice": True,
}
CALL = '<tool_call>\n{"name": "get", "arguments": {"a": "é日 👩‍💻 and a value of some length"}}\n</tool_call>'
FORCED = '{"name": "get", "parameters": {"a": "é日 and a value of some length"}}'
OUTPUTS = {
    "in the reasoning": "<think>Let me see: é日👍, one thing after the other.</think>\n\nAn answer: 日本.",
    "in a call": f"<think>A call.</think>\n{CALL}{CALL}",
    "in a forced call": f"<think>A call.</think>[{FORCED}, {FORCED}]",
}
CARRIES = ("output", "structured_outputs", "structured_outputs_after_reasoning")


@contextlib.asynccontextmanager
async def serving(at: Path, fakes: list[FakeInstance]) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    config = GatewayConfig(
        model=str(at), served_model_name=[MODEL], preset="off", workers=[fake.url for fake in fakes], **FLAGS
    )
    app = application.build(config, at, parsers=load(config, at))
    port = free_port()
    server = Server(uvicorn.Config(DirectSend(app), host="127.0.0.1", port=port, log_config=None))
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield app.state.gateway, client
    server.should_exit = True
    await asyncio.wait_for(task, 60)


async def stream(client: httpx.AsyncClient, body: dict[str, Any], moves: Any = None) -> list[Any]:
    chunks, mover = [], None
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
                if mover is None and moves is not None:
                    mover = asyncio.create_task(moves())
    if mover is not None:
        await mover
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    return ours.shown(chunks)


@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize("choice", ["auto", "none", "required"])
async def test_a_moved_chat_has_the_same_deltas(tmp_path: Path, case: str, choice: str) -> None:
    at = folder(tmp_path / "model", vocab_size=tokenizer().get_vocab_size())
    script = ids(OUTPUTS[case])
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 1000,
        "request_id": "mine",
        "vllm_xargs": {"ares_mock_tokens": script},
        "stream_options": {"include_usage": True},
    }
    size = tokenizer().get_vocab_size()
    async with (
        instances("prefill", "decode", "decode", vocabulary=size, step_s=0.02, carries=CARRIES) as fakes,
        serving(at, fakes) as (gateway, client),
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in gateway.pool.instances), 15)
        wanted = await stream(client, body)
        assert len(wanted) > 20

        async def moves() -> None:
            for _ in range(3):
                await eventually(
                    lambda: "mine" not in gateway.sessions or gateway.sessions["mine"].unmovable_now() is None
                )
                session = gateway.sessions.get("mine")
                if session is None or session.instance is None:
                    return
                target = "decode-1" if session.instance.name == "decode-0" else "decode-0"
                await client.post("/admin/v1/migrations", json={"request_id": "mine", "target": target})

        given = await stream(client, body, moves)
        assert [record.outcome for record in gateway.migrations].count("moved") >= 2
        assert given == wanted
        counted = gateway.metrics.registry.get_sample_value("ares_output_part_tokens_total", {"part": "reasoning"})
        assert counted
        assert counted % 2 == 0  # both runs the same
