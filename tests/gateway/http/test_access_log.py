"""The access log: one line a request, in text and with fields, and nothing of what it holds."""

import logging
from pathlib import Path

import pytest

from ares.gateway.http.access_log import AccessLog
from tests.gateway.fakes import FakeInstance
from tests.gateway.http.service import serving
from tests.waiting import eventually


async def test_every_request_is_a_line(
    fakes: list[FakeInstance], model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ares.access")
    async with serving(fakes, model_folder, access_log=True) as service:
        await eventually(lambda: service.gateway.pool.ready)
        headers = {"x-request-id": "mine"}
        body = {"prompt": [1, 2], "max_tokens": 3, "stream": True}
        assert (await service.client.post("/v1/completions", json=body, headers=headers)).status_code == 200
        assert (await service.client.get("/nothing%0Aelse?key=secret")).status_code == 404
        assert (await service.client.get("/health")).status_code == 200
        assert (await service.client.post("/v1/completions", content=b"{")).status_code == 415
    records = [record for record in caplog.records if record.name == "ares.access"]
    found = [(vars(r)["method"], vars(r)["path"], vars(r)["status"], vars(r)["request_id"]) for r in records]
    assert found == [
        ("POST", "/v1/completions", 200, "mine"),
        ("GET", "/nothing%0Aelse", 404, ""),
        ("POST", "/v1/completions", 415, ""),
    ]
    assert records[0].getMessage().startswith("127.0.0.1 POST /v1/completions 200 ")
    assert "secret" not in caplog.text
    assert vars(records[0])["duration_s"] > 0


async def test_a_client_that_leaves_and_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def nothing(*_: object) -> None:
        pass

    async def failing(*_: object) -> None:
        raise ValueError

    caplog.set_level(logging.DEBUG, "ares.access")
    scope = {"type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "client": None}
    layer = AccessLog(nothing, iter([1.0, 3.5]).__next__)
    await layer(scope, nothing, nothing)  # type: ignore[arg-type] # neither is called
    with pytest.raises(ValueError):  # noqa: PT011 - passed on as it is
        await AccessLog(failing)(scope, nothing, nothing)  # type: ignore[arg-type]
    first, second = caplog.records
    assert first.getMessage() == " GET /health 499 2.500 s"
    assert (first.levelno, vars(second)["status"]) == (logging.DEBUG, 500)
