import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ares.bench.environment import describe
from tests.fuzz.cases import TIMES, ran
from tests.fuzz.service import Service, settled
from tests.gateway import conftest as gateway

byte_tokenizer, model_folder, text_model = gateway.byte_tokenizer, gateway.model_folder, gateway.text_model
_BEGUN = time.monotonic()


@pytest.fixture(scope="module")
def running(model_folder: Path) -> Iterator[Service]:
    """A service of each module: one that ran on beside all other tests would have its say in their logs."""
    with Service(model_folder).running() as service:
        service.completes()
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """A service that must be as before after each test: nothing left behind, and still right."""
    before = running.footprint()
    yield running
    settled(running, before)
    running.completes()
    assert running.send("GET", "/health", port=running.stray_port).status == 200


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many cases each target was given."""
    if ran:
        terminalreporter.section("fuzzing")
        for target, cases in sorted(ran.items()):
            terminalreporter.write_line(f"{cases:8} {target}")
        terminalreporter.write_line(f"{ran.total():8} cases in all")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the same as JSON to the file that ARES_FUZZ_JSON names."""
    if (file := os.environ.get("ARES_FUZZ_JSON")) and ran:
        result = {
            "environment": describe(),
            "times": TIMES,
            "seconds": round(time.monotonic() - _BEGUN, 1),
            "failed": session.testsfailed,
            "total": ran.total(),
            "cases": dict(sorted(ran.items())),
        }
        Path(file).write_text(json.dumps(result, indent=2) + "\n")
