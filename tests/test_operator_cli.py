"""What the operator's commands print."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from ares.cli import app

INSTANCE = {"role": "decode", "url": "http://127.0.0.1:8101", "healthy": True, "draining": False, "left": 0}
LOAD = {
    "running": 12,
    "waiting": 0,
    "resident_tokens": 10_240,
    "predicted_remaining_tokens": 4096.4,
    "kv_blocks_used": 90,
    "kv_blocks": 120,
    "preemptions": 3,
}
REQUEST = {
    "id": "chatcmpl-0123456789abcdef",
    "state": "decoding",
    "instance": "decode-0",
    "output_tokens": 512,
    "remaining_p50": 120.25,
    "remaining_p90": 900.0,
    "moves": 1,
    "movable": False,
    "reason": "speculation",
}
MOVE = {
    "request_id": "chatcmpl-0123456789abcdef",
    "source": "decode-0",
    "target": "decode-1",
    "reason": "decode-0 drains",
    "outcome": "moved",
    "stall_s": 0.0517,
    "pulled_tokens": 1400,
}
STATUS: dict[str, Any] = {
    "gateway": "ab12cd34",
    "controller": {"where": "here", "holder": "ab12cd34", "missed_periods": 0},
    "instances": [
        {"name": "decode-0", **INSTANCE, **LOAD},
        {"name": "decode-1", **INSTANCE, **LOAD, "draining": True},
        {"name": "decode-2", **INSTANCE, "healthy": False},
    ],
    "requests": [REQUEST],
    "migrations": [MOVE, MOVE | {"outcome": "returned", "stall_s": None, "pulled_tokens": None}],
}


@pytest.fixture
def gateway() -> Iterator[str]:
    """The URL of something that has this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(STATUS).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_status_fits_80_columns(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["status", "--url", gateway])
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert ["decode-0", "decode", "ok", "12", "0", "75%", "4,096", "3"] in lines
    assert ["decode-1", "decode", "draining", "12", "0", "75%", "4,096", "3"] in lines
    assert ["decode-2", "decode", "silent", "-", "-", "-", "-", "-"] in lines
    assert [REQUEST["id"], "decode-0", "512", "120", "(900)", "1", "speculation"] in lines
    moved, returned = (line for line in lines if "→" in line)
    assert moved[:4] == [MOVE["request_id"], "decode-0", "→", "decode-1"]
    assert moved[-2:] == ["moved", "52"]
    assert returned[-2:] == ["returned", "-"]


def test_the_status_in_json_has_everything(gateway: str) -> None:
    shown = CliRunner().invoke(app, ["status", "--json", "--url", gateway])
    assert json.loads(shown.stdout) == STATUS
