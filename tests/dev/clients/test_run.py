"""One client: found or not, in its own environment, stopped at its limit, and its checks summed."""

import json
import socket
import sys
from pathlib import Path

import pytest

from ares_dev.clients.report import ANSWERED, PARSED, Check, Report, Target
from ares_dev.clients.run import figures, run
from ares_dev.clients.table import CLIENTS, Client

NOWHERE = Target("http://127.0.0.1:9", "model", "model")


def lines(file: Path) -> list[Check]:
    return [Check(**json.loads(line)) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "client",
    [
        Client("guidellm", "pip install it", distributions=("ares-has-no-such-distribution",)),
        Client("curl", "pip install it", version_command=("ares-has-no-such-program", "--version")),
    ],
)
def test_a_client_that_is_not_installed_is_neither_a_success_nor_a_failure(client: Client) -> None:
    assert run(client, NOWHERE, None, 10) == {"installed": False, "install": "pip install it"}


def test_a_virtual_environment_with_the_name_of_a_client_is_its_own(tmp_path: Path) -> None:
    python = tmp_path / "litellm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert CLIENTS["litellm"].python(tmp_path) == str(python)
    assert CLIENTS["openai"].python(tmp_path) == sys.executable
    assert CLIENTS["litellm"].python(None) == sys.executable


def test_every_client_has_a_script() -> None:
    folder = Path(sys.modules[Client.__module__].__file__ or "").parent
    for client in CLIENTS.values():
        assert (folder / f"{client.module.rpartition('.')[2]}.py").is_file()


def test_a_client_is_stopped_at_its_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts connections and answers nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        row = run(CLIENTS["open-webui"], Target(url, "model", "model"), None, 2)
    assert (row["requests"], row["failed"]) == (0, 1)
    assert row["failures"] == ["the script: not done after 2 s"]


def test_a_server_that_is_not_there_fails_every_request() -> None:
    row = run(CLIENTS["open-webui"], NOWHERE, None, 30)
    assert row["requests"] == row["failed"] == 9
    assert len(row["failures"]) == 5
    assert "127.0.0.1:9" in row["failures"][0]


def test_a_check_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    report = Report(tmp_path / "report")
    with report.check("bad"):
        raise ValueError("x" * 10_000)
    with report.check("good", requests=2):
        pass
    bad, good = lines(tmp_path / "report")
    assert (bad.failed, bad.errors[0][:13]) == (1, "ValueError: x")
    assert len(bad.errors[0]) < 1000
    assert (good.name, good.requests, good.failed) == ("good", 2, 0)


def test_failed_requests_of_a_benchmark_are_counted_and_the_first_texts_kept() -> None:
    check = Check("benchmark", 8)
    for number in range(6):
        check.fail(f"error {number}")
    row = figures([check, Check("chat", tool_call=PARSED), Check("chat", tool_call=ANSWERED), Check("chat")])
    assert (row["requests"], row["failed"]) == (11, 6)
    assert row["failures"] == ["benchmark: error 0", "benchmark: error 1", "benchmark: error 2"]
    assert row["tool_calls"] == {"parsed": 1, "answered_in_text": 1}


def test_a_call_must_be_of_the_given_tool() -> None:
    check = Check("chat")
    check.called("get_weather", '{"city": "Oslo"}')
    assert check.tool_call == PARSED
    for function, arguments in (("get_time", {"city": "Oslo"}), ("get_weather", {}), ("get_weather", "[]")):
        with pytest.raises(AssertionError, match="the call is"):
            Check("chat").called(function, arguments)


def test_an_unparsed_call_is_no_answer() -> None:
    check = Check("chat")
    check.answered("It rains.")
    assert check.tool_call == ANSWERED
    with pytest.raises(AssertionError, match="unparsed"):
        check.answered('<tool_call>{"name": "get_weather"}</tool_call>')
    with pytest.raises(AssertionError, match="required"):
        check.answered("It rains.", forced=True)
