"""Gateways that name instances and take reports, and those that do not: each fault is one line."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from ares.learner.gateways import Gateway


class Replies:
    """What a gateway answers to both routes."""

    def __init__(self) -> None:
        self.status = 200
        self.body: object = {"instances": [{"name": "decode-0", "url": "http://127.0.0.1:8101/"}]}
        self.taken: list[bytes] = []
        self.keys: set[str | None] = set()

    async def answer(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        if request.method == "PUT":
            self.taken.append(await request.read())
        return web.json_response(self.body, status=self.status)


@asynccontextmanager
async def serving(replies: Replies) -> AsyncIterator[Gateway]:
    app = web.Application()
    app.add_routes([web.get("/admin/v1/status", replies.answer), web.put("/admin/v1/predictor", replies.answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer key"}) as http:
        yield Gateway(url, http)
    await runner.cleanup()


async def test_instances_and_reports() -> None:
    replies = Replies()
    async with serving(replies) as gateway:
        assert await gateway.instances() == ["http://127.0.0.1:8101"]
        assert await gateway.report(json.dumps({"learner": "a"}).encode())
    assert replies.taken == [b'{"learner": "a"}']
    assert replies.keys == {"Bearer key"}


@pytest.mark.parametrize(
    ("status", "body", "lines"),
    [
        (401, {}, ["give its admin key with --admin-key-file", "give its admin key with --admin-key-file"]),
        (404, {}, ["it answers 404", "of an earlier version"]),
        (400, {"error": "losses: too many"}, ["it answers 400", "losses: too many"]),
        (200, [1, 2], ["is it a gateway of ARES?"]),
    ],
)
async def test_what_is_wrong_is_said_once(
    status: int, body: object, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    replies = Replies()
    replies.status, replies.body = status, body
    caplog.set_level("INFO")
    async with serving(replies) as gateway:
        for _ in range(3):
            assert await gateway.instances() is None
            assert await gateway.report(b"{}") is (status == 200)
        said = [record.getMessage() for record in caplog.records if record.name == "ares.learner.gateways"]
        assert len(said) == len(lines)
        assert all(line in text for line, text in zip(lines, said, strict=True))
        replies.status, replies.body = 200, {"instances": []}
        assert await gateway.instances() == []
    assert "answers again" in caplog.text


async def test_a_gateway_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    async with aiohttp.ClientSession() as http:
        gateway = Gateway("http://127.0.0.1:9", http)
        for _ in range(2):
            assert await gateway.instances() is None
    assert caplog.text.count("its instances are not known") == 1
