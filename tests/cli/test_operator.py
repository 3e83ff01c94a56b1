"""What the operator's commands print."""

import json
import socket
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from ares.cli import operator
from ares.cli.main import app
from ares.names import matching
from ares.terminal.http_client import open_url
from tests.certificates import self_signed
from tests.http_server import answering

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
    "state": "decode",
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
    "reason": "drain of decode-0",
    "outcome": "moved",
    "stall_s": 0.0517,
    "pulled_tokens": 1400,
}
STATUS: dict[str, Any] = {
    "gateway": "ab12cd34",
    "preset": "ares",
    "controller": {"where": "here", "holder": "ab12cd34", "missed_periods": 0},
    "instances": [
        {"name": "decode-0", **INSTANCE, **LOAD},
        {"name": "decode-1", **INSTANCE, **LOAD, "draining": True},
        {"name": "decode-2", **INSTANCE, "healthy": False, "why": "it serves another model: other-model"},
        {"name": "decode-3", **INSTANCE, **LOAD, "differs_in": "data type (float16, bfloat16 there: --dtype)"},
    ],
    "requests": [REQUEST],
    "migrations": [MOVE, MOVE | {"outcome": "returned", "stall_s": None, "pulled_tokens": None}],
}


HEX = "3f1c9a0b7d2e4c5f8a9b0c1d2e3f4a5"
HOSTS = [f"ares-decode-{n}.ares-decode.production.svc.cluster.local:8100" for n in range(3)]
IDS = [f"{HEX}b", f"{HEX}c-0", f"{HEX}c-1", "gravity"]
WHY = f"ares: expected peak 120345 of 118000 tokens on {HOSTS[0]} in 412 steps; gain 3.4 s of step time, cost 0.05 s"
LONG = STATUS | {
    "instances": [{"name": name, **INSTANCE, **LOAD} for name in HOSTS],
    "requests": [
        REQUEST | {"id": name, "instance": HOSTS[n % 3], "output_tokens": 12345, "remaining_p90": 100_000.0}
        for n, name in enumerate(IDS)
    ],
    "migrations": [
        MOVE | {"request_id": name, "source": HOSTS[0], "target": HOSTS[1], "reason": WHY} for name in IDS[:2]
    ],
}


class Answer:
    """What the server below answers."""

    def __init__(self) -> None:
        self.status, self.body = 200, json.dumps(STATUS).encode()
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []


@pytest.fixture
def answer() -> Answer:
    return Answer()


@pytest.fixture
def gateway(answer: Answer) -> Iterator[str]:
    """The URL of a server that gives this answer."""

    def recorded(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        answer.paths.append(request.path)
        answer.headers.append(dict(request.headers.items()))
        return answer.status, answer.body

    with answering(recorded) as url:
        yield url


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARES_URL", "ARES_ADMIN_KEY", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def status(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["status", *arguments])


def test_the_status_fits_80_columns(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["status", "--url", gateway])
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert ["decode-0", "decode", "ready", "12", "0", "75%", "4,096", "3"] in lines
    assert ["decode-1", "decode", "draining", "12", "0", "75%", "4,096", "3"] in lines
    assert ["decode-2", "decode", "not", "ready", "-", "-", "-", "-", "-"] in lines
    assert [REQUEST["id"], "decode-0", "512", "120", "(900)", "1", "speculation"] in lines
    moved, returned = (line for line in lines if "→" in line)
    assert moved[:4] == [MOVE["request_id"], "decode-0", "→", "decode-1"]
    assert moved[-2:] == ["moved", "52"]
    assert returned[-2:] == ["returned", "-"]


def test_the_status_of_several_models_names_them(answer: Answer, gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [row | {"model": "org/two" if row["name"] == "decode-2" else "org/one"} for row in STATUS["instances"]]
    models = [{"name": "org/one", "why": None}, {"name": "org/two", "why": "no instance that decodes is known"}]
    answer.body = json.dumps(STATUS | {"instances": rows, "models": models}).encode()
    lines = [line.rstrip() for line in status("--url", gateway).output.splitlines()]
    assert max(map(len, (line for line in lines if ":" not in line))) <= 80
    one, two = lines.index("instances of org/one"), lines.index("instances of org/two")
    assert one < next(n for n, line in enumerate(lines) if line.startswith(" decode-0 ")) < two
    assert two < next(n for n, line in enumerate(lines) if line.startswith(" decode-2 "))
    assert "org/two is not ready: no instance that decodes is known" in lines


def test_the_status_says_why_an_instance_is_not_used(gateway: str) -> None:
    lines = status("--url", gateway).output.splitlines()
    assert "decode-2: it serves another model: other-model" in lines
    assert not [line for line in lines if line.startswith(("decode-0:", "decode-1:"))]
    said = "decode-3 differs from most in data type (float16, bfloat16 there: --dtype): no request moves to or from it"
    assert said in lines


def test_the_status_in_json_has_everything(gateway: str) -> None:
    shown = CliRunner().invoke(app, ["status", "--json", "--url", gateway])
    assert json.loads(shown.stdout) == STATUS


# --- long names ---


def shown(columns: str | None, answer: Answer, gateway: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    answer.body = json.dumps(LONG).encode()
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    done = status("--url", gateway)
    assert done.exit_code == 0, done.output
    return [line.rstrip() for line in done.stdout.splitlines()]


def test_long_names_fit_80_columns(answer: Answer, gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown("80", answer, gateway, monkeypatch)
    assert max(map(len, lines)) <= 80
    # One line for each instance, for each request, and for each move but for its reason.
    for n, request in enumerate(IDS):
        (line,) = (line for line in lines if line.split()[2:] == ["12345", "120", "(100,000)", "1", "speculation"]
                   and matching(line.split()[0], IDS) == [request])  # fmt: skip
        assert matching(line.split()[1], HOSTS) == [HOSTS[n % 3]]
    rows = [line.split() for line in lines]
    assert [matching(row[0], HOSTS) for row in rows if row[1:3] == ["decode", "ready"]] == [[name] for name in HOSTS]
    moves = [row for row in rows if "→" in row]
    assert [matching(row[0], IDS) for row in moves] == [[name] for name in IDS[:2]]
    assert [row[4:] for row in moves] == [["moved", "52"]] * 2
    # The whole reason is there, on few lines.
    assert "".join(WHY.split()) in "".join("".join(row) for row in rows)
    assert len(lines) < 40


def test_long_names_are_whole_where_there_is_room(
    answer: Answer, gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown("200", answer, gateway, monkeypatch)
    assert max(map(len, lines)) <= 200
    for n, request in enumerate(IDS):
        assert any(line.split()[:2] == [request, HOSTS[n % 3]] for line in lines)
    assert any(line.split()[:4] == [IDS[0], HOSTS[0], "→", HOSTS[1]] for line in lines)


def test_no_line_is_broken_in_a_pipe(answer: Answer, gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(None, answer, gateway, monkeypatch)
    moves = [line for line in lines if "→" in line]
    assert len(moves) == 2
    assert all(line.split()[:4] == [name, HOSTS[0], "→", HOSTS[1]] for name, line in zip(IDS, moves, strict=False))
    assert all(WHY in line and line.endswith("52") for line in moves)


def test_a_request_that_waits_has_no_instance(answer: Answer, gateway: str) -> None:
    answer.body = json.dumps(STATUS | {"requests": [REQUEST | {"state": "waiting", "instance": None}]}).encode()
    assert "waiting" in status("--url", gateway).stdout


# --- where the gateway is ---


@pytest.mark.parametrize("behind", ["", "/", "//", " "])
def test_slashes_behind_the_address_do_not_matter(behind: str, answer: Answer, gateway: str) -> None:
    assert CliRunner().invoke(app, ["status"], env={"ARES_URL": gateway + behind}).exit_code == 0
    assert status("--url", f"{gateway}{behind}").exit_code == 0
    assert answer.paths == ["/admin/v1/status"] * 2


def test_a_gateway_behind_a_path_of_a_proxy(answer: Answer, gateway: str) -> None:
    assert status("--url", f"{gateway}/team/ares/").exit_code == 0
    assert answer.paths == ["/team/ares/admin/v1/status"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:18300", "'127.0.0.1:18300' is not the address of a gateway, such as http://127.0.0.1:8000"),
        ("localhost:8000", "'localhost:8000' is not the address"),
        ("localhost", "'localhost' is not the address"),
        ("ftp://localhost", "is not the address"),
        ("http://", "is not the address"),
        ("http://:8000", "is not the address"),
        ("http://127.0.0.1:port", "is not the address"),
        ("http://127.0.0.1:99999", "is not the address"),
        ("http://127.0.0.1:0", "is not the address"),
        ("http://[::1", "is not the address"),
        ("http://a b:8000", "is not the address"),
        ("http://a\x01b:8000", "is not the address"),
        ("http://127.0.0.1:8000/v1", "the address of the gateway alone, http://127.0.0.1:8000, not"),
        ("http://127.0.0.1:8000/admin/v1/status", "the address of the gateway alone, http://127.0.0.1:8000, not"),
        ("http://127.0.0.1:8000/?a=b", "the address of the gateway alone, http://127.0.0.1:8000, not"),
        ("http://me:secret@127.0.0.1:8000", "no user name and password"),
    ],
)
@pytest.mark.parametrize("command", [["status"], ["migrate", "a", "--to", "b"], ["drain", "a"], ["preset"]])
def test_an_address_that_is_none_is_said_in_a_line(command: list[str], url: str, said: str) -> None:
    for done in (
        CliRunner().invoke(app, [*command, "--url", url]),
        CliRunner().invoke(app, command, env={"ARES_URL": url}),
    ):
        assert done.exit_code == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: --url (ARES_URL): ")
        assert said in line
        assert "secret" not in line


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (200, b"[]", "no gateway at URL: what answers there is something else"),
        (200, b"<html>", "no gateway at URL: what answers there is something else"),
        (404, b'{"detail": "Not Found"}', "no gateway at URL: it answers 404 Not Found"),
        (
            404,
            b'{"error": {"message": "no such route: GET /x", "code": null}}',
            "no gateway at URL: no such route: GET /x",
        ),
        (404, b'{"error": {"message": "no instance \'a\'", "code": "instance_not_found"}}', "error: no instance 'a'"),
        (502, b"Bad gateway", "no gateway at URL: it answers 502 Bad Gateway"),
    ],
)
def test_what_answers_is_said_in_a_line(code: int, body: bytes, said: str, answer: Answer, gateway: str) -> None:
    answer.status, answer.body = code, body
    done = status("--url", gateway)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert said.replace("URL", gateway) in line


def test_what_speaks_no_http_is_said_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(20)

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = Thread(target=greet)
        thread.start()
        done = status("--url", f"http://127.0.0.1:{other.getsockname()[1]}")
        thread.join()
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "no gateway at" in line


def test_what_is_wrong_about_tls_is_said_in_a_line(
    answer: Answer, gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    with answering(lambda _: (200, b"{}"), certificate) as secured:
        for url, advice in (
            (secured, "set SSL_CERT_FILE to the certificate of the authority"),
            (secured.replace("https:", "http:"), "it may speak TLS: give --url with https://"),
            (gateway.replace("http:", "https:"), "it may not speak TLS: give --url with http://"),
        ):
            done = status("--url", url)
            assert done.exit_code == 1
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"error: no gateway at {url}: ")
            assert advice in line
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with open_url(urllib.request.Request(f"{secured}/x"), timeout=5) as reply:  # noqa: S310 - our own
            assert reply.read() == b"{}"


def test_a_proxy_is_not_asked_for_loopback(answer: Answer, gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert status("--url", gateway).exit_code == 0
    done = status("--url", "http://gateway.example:8000")
    assert done.exit_code == 1
    assert "no gateway at http://gateway.example:8000, asked through the proxy" in done.stderr


# --- its key ---


def test_the_key_of_a_variable(answer: Answer, gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_ADMIN_KEY", "secret\n")
    assert status("--url", gateway).exit_code == 0
    assert answer.headers[0]["Authorization"] == "Bearer secret"
    for key in ("sécret\u0416", "se\ncret"):
        monkeypatch.setenv("ARES_ADMIN_KEY", key)
        done = status("--url", gateway)
        assert done.exit_code == 2
        (line,) = done.stderr.splitlines()
        assert "ARES_ADMIN_KEY" in line
        assert "cret" not in line.replace("secret", "")


def test_a_log_without_decisions_is_no_success(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    done = CliRunner().invoke(app, ["replay", str(log)])
    assert (done.exit_code, f"{log}: cannot be read: No such file" in done.stderr) == (2, True)
    log.touch()
    done = CliRunner().invoke(app, ["replay", str(log)])
    assert (done.exit_code, f"{log}: no decisions in it" in done.stderr) == (2, True)


def test_a_change_of_role_is_waited_for_though_some_that_answer_have_not_heard_of_it() -> None:
    instance = {"name": "decode-0", **INSTANCE, **LOAD, "role_left_s": 0.0}
    begun, new = instance | {"next_role": "prefill"}, instance | {"role": "prefill", "next_role": None}
    answers = [begun, instance | {"next_role": None}, begun, instance | {"next_role": None}, new]

    def answered(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        row = answers.pop(0) if len(answers) > 1 else answers[0]
        return 200, json.dumps(row if request.command == "POST" else STATUS | {"instances": [row]}).encode()

    with answering(answered) as url:
        shown = CliRunner().invoke(app, ["role", "decode-0", "prefill", "--wait", "--url", url])
    assert (shown.exit_code, shown.stdout.strip()) == (0, "decode-0 has the role prefill")


def test_an_instance_that_keeps_its_role_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "HEARD_S", 0.3)
    kept = {"name": "decode-0", **INSTANCE, **LOAD, "next_role": None, "role_left_s": 0.0}

    def answered(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        ordered = kept | {"next_role": "prefill"}
        return 200, json.dumps(ordered if request.command == "POST" else STATUS | {"instances": [kept]}).encode()

    with answering(answered) as url:
        shown = CliRunner().invoke(app, ["role", "decode-0", "prefill", "--wait", "--url", url])
    assert (shown.exit_code, shown.stdout.strip()) == (1, "decode-0 has the role decode")
