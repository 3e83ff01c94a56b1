"""`ares bench relay` and `ares bench first-tokens`: real gateways and mock engines, next to another router."""

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ares.bench import servers
from ares.cli.main import app
from ares.models.resolve import DEFAULT_MODEL

RELAY = ["--streams", "2", "--tokens", "30", "--paced-tokens", "4", "--interval-ms", "5", "--repeats", "1"]
RELAY += ["--first-tokens", "2"]
FIRST_TOKENS = ["--streams", "6", "--tokens", "3", "--interval-ms", "5", "--rounds", "2"]
# Answers as a router: chats of TOKENS tokens have one too few, or break off.
ROUTER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault = "FAULT" if asked["max_tokens"] == TOKENS else ""
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        tokens = asked["max_tokens"] - (fault == "short")
        for part in [dict(role="assistant", content="")] + [dict(content="text")] * tokens:
            self.write(b"data: " + json.dumps(dict(choices=[dict(index=0, delta=part)])).encode() + b"\\n\\n")
        if fault == "broken":
            self.close_connection = True
            return
        self.write(b"data: [DONE]\\n\\n")
        self.wfile.write(b"0\\r\\n\\r\\n")

    def write(self, data):
        self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(data), data))

port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def router(folder: Path, fault: str = "", tokens: int = 0) -> str:
    """Write the program of a router whose chats of so many tokens have a fault."""
    path = folder / "router"
    text = ROUTER.format(python=sys.executable).replace("FAULT", fault).replace("TOKENS", str(tokens))
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# Stands in for an interpreter with Dynamo: as its frontend it answers as the router does, as its worker it checks that
# the file of the pace has a number.
DYNAMO = """#!{python}
import sys, time
given = sys.argv
if "dynamo.frontend" in given:
    sys.argv = ["", "--port", given[given.index("--http-port") + 1]]
    text = open({router!r}).read().replace('b"ok"', {answer!r}).replace('"2"', {length!r})
    exec(text.replace('[dict(role="assistant", content="")] + ', ""))  # the role comes with the first token
elif "--pace" in given:
    while True:
        float(open(given[given.index("--pace") + 1]).read())
        time.sleep(0.01)
"""


def dynamo(folder: Path) -> str:
    """Write the program of an interpreter with Dynamo."""
    path, answer = folder / "python-dynamo", f'b"{DEFAULT_MODEL}"'
    length = f'"{len(DEFAULT_MODEL)}"'
    path.write_text(DYNAMO.format(python=sys.executable, router=router(folder), answer=answer, length=length))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def said(done: Result) -> str:
    return " ".join(done.output.split())


def written(path: Path, done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(path.read_text())
    assert {"versions", "commit", "machine", "measured_at", "note"} <= set(result)
    assert {"ares", "uvloop", "httptools"} <= set(result["versions"])
    return result


@pytest.mark.timeout(240)
def test_relay_measures_each_system(tmp_path: Path) -> None:
    path = tmp_path / "relay.json"
    done = bench("relay", *RELAY, "--router", router(tmp_path), "--json", str(path))
    result = written(path, done)
    assert result["benchmark"] == "relay"
    assert result["settings"]["tokens"] == {"as_fast_as_read": 30, "paced": 4}
    assert set(result["systems"]) == {"ares", "vllm-router prefill-decode", "vllm-router plain"}
    for name, figures in result["systems"].items():
        for mode in ("as_fast_as_read", "paced"):
            spent = figures[mode]["cpu_s_per_100k_chunks"]
            assert len(spent["runs"]) == 1
            assert spent["median"] == spent["runs"][0] >= 0
            assert figures[mode]["chunks_per_read"] > 0
        assert set(figures["added_ttft_ms"]) == {"p50", "p95"}
        assert figures["rss_mb"] > 5
        assert name in said(done)


@pytest.mark.timeout(240)
def test_relay_measures_the_frontend_of_dynamo(tmp_path: Path) -> None:
    path = tmp_path / "relay.json"
    result = written(path, bench("relay", *RELAY, "--dynamo", dynamo(tmp_path), "--json", str(path)))
    assert set(result["systems"]) == {"ares", "dynamo"}
    assert result["systems"]["dynamo"]["rss_mb"] > 5


@pytest.mark.timeout(240)
def test_first_tokens_measures_each_gateway_and_none(tmp_path: Path) -> None:
    path = tmp_path / "first.json"
    given = ["--processes", "1", "--processes", "2", "--json", str(path)]
    result = written(path, bench("first-tokens", *FIRST_TOKENS, *given))
    assert result["benchmark"] == "first-tokens"
    assert (result["settings"]["streams"], result["settings"]["processes"]) == (6, [1, 2])
    systems = result["systems"]
    assert list(systems) == ["mock decode", "ares", "ares, 2 processes"]
    for figures in systems.values():
        assert len(figures["rounds"]) == 2
        for shown in (*figures["rounds"], figures["median"]):
            assert 0 < shown["p50_ms"] <= shown["p99_ms"] <= shown["longest_ms"]
            assert shown["cpu_ms_per_stream"] >= 0
    # The parent, and its two processes.
    assert [len(figures["pss_mb"]) for figures in systems.values()] == [1, 1, 3]
    assert all(size > 1 for figures in systems.values() for size in figures["idle_pss_mb"] + figures["pss_mb"])


@pytest.mark.timeout(240)
def test_relay_fails_with_a_token_too_few(tmp_path: Path) -> None:
    path = tmp_path / "relay.json"
    done = bench("relay", *RELAY, "--router", router(tmp_path, "short", 30), "--json", str(path))
    assert done.exit_code == 1
    assert "31 events arrived instead of 32" in said(done)
    assert not path.exists()


@pytest.mark.timeout(240)
def test_first_tokens_fails_with_a_broken_stream(tmp_path: Path) -> None:
    path = tmp_path / "first.json"
    done = bench("first-tokens", *FIRST_TOKENS, "--router", router(tmp_path, "broken", 3), "--json", str(path))
    assert done.exit_code == 1
    assert "the stream broke" in said(done)
    assert not path.exists()


def test_a_router_that_is_missing_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with (
        pytest.raises(servers.BenchError, match=r"vllm-router plain cannot be started: .*missing"),
        servers.vllm_router(missing, {"prefill": 1, "decode": 2}, "plain", tmp_path),
    ):
        pass


@pytest.mark.timeout(240)
def test_the_log_of_what_does_not_serve_is_shown(tmp_path: Path) -> None:
    with (
        pytest.raises(servers.BenchError, match=r"(?s)ares with parsers does not serve; .*--no-such-flag"),
        servers.gateway({}, DEFAULT_MODEL, tmp_path, "ares with parsers", ["--no-such-flag"]),
    ):
        pass


@pytest.mark.parametrize(
    "given",
    [
        ["relay", "--streams", "0"],
        ["relay", "--tokens", "1"],
        ["relay", "--interval-ms", "0"],
        ["relay", "--parsers", "'not closed"],
        ["first-tokens", "--streams", "0"],
        ["first-tokens", "--processes", "0"],
        ["first-tokens", "--rounds", "0"],
    ],
)
def test_options_out_of_range_are_refused(given: list[str]) -> None:
    done = bench(*given)
    assert done.exit_code == 2
    assert given[1] in said(done)
