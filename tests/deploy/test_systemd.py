"""The systemd units: taken by systemd, with commands that exist and time for the drain."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ares.config import GatewayConfig
from tests.deploy.commands import parsed

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))


def service(unit: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(FOLDER / unit)
    return dict(parser["Service"])


def command(unit: str, variables: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of the command of a unit: `${NAME}` is one argument, `$NAME` any number."""
    program, *arguments = service(unit)["ExecStart"].split()
    assert program == "/opt/ares/bin/ares"
    given = []
    for argument in arguments:
        many = re.fullmatch(r"\$(\w+)", argument)
        text = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], argument)
        given += shlex.split(variables[many[1]]) if many else [text]
    return parsed(given)


def environment(file: str) -> dict[str, str]:
    lines = (FOLDER / file).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_them(tmp_path: Path) -> None:
    """With a program that exists, under the name of an instance where a unit is a template."""
    made = []
    for unit in UNITS:
        made.append(tmp_path / unit.name.replace("@.", "@decode-0."))
        made[-1].write_text(unit.read_text().replace("/opt/ares/bin/ares", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", *made], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")  # warnings leave the status at 0


def test_the_gateway() -> None:
    given, left = command("ares-gateway.service", {"CREDENTIALS_DIRECTORY": "/keys"})
    assert left == []
    assert (given["config"], given["api_key_file"]) == (Path("/etc/ares/gateway.yaml"), Path("/keys/api-keys"))
    default = GatewayConfig.model_fields["shutdown_timeout_s"].default
    assert float(service("ares-gateway.service")["TimeoutStopSec"]) == default + 10


def test_an_instance() -> None:
    given, left = command("ares-worker@.service", {"CREDENTIALS_DIRECTORY": "/keys"} | environment("worker.env"))
    assert left == ["--max-model-len", "8192"]
    assert (given["role"], given["host"], given["port"]) == ("decode", "10.0.0.2", 8100)
    read = service("ares-worker@.service")
    assert float(read["TimeoutStopSec"]) >= given["drain_deadline"] + 30
    assert read["KillMode"] == "mixed"  # vLLM's engine gets no SIGTERM of its own


def test_the_learner() -> None:
    given, left = command("ares-learner.service", {"CREDENTIALS_DIRECTORY": "/keys", "GATEWAY": "http://g:8000"})
    assert left == []
    assert given["gateway"] == ["http://g:8000"]
