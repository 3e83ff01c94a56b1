"""Tests for our log lines in an instance's processes."""

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ares.engine.logs import follow_vllm

CODE = """
import logging
from vllm.logger import _configure_vllm_root_logger as configure
from ares.engine.logs import follow_vllm
follow_vllm()
configure()
follow_vllm()
logging.getLogger("ares.engine.drain").info("drained")
logging.getLogger("ares.engine.drain").debug("too much")
"""


@pytest.fixture
def ours() -> Iterator[logging.Logger]:
    logger = logging.getLogger("ares")
    parent = logger.parent
    logger.parent = logging.getLogger()  # another test may have begun an instance in this process
    yield logger
    logger.parent = parent


def test_lines_come_once_and_as_vllm_writes_them() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "drained" in line or "too much" in line]
    assert len(lines) == 1
    assert "INFO" in lines[0]


def test_loggers_that_somebody_set_up_stay_as_they_are(ours: logging.Logger) -> None:
    theirs, own = io.StringIO(), io.StringIO()
    vllm, handler, mine = logging.getLogger("vllm"), logging.StreamHandler(theirs), logging.StreamHandler(own)
    vllm.addHandler(handler)
    ours.addHandler(mine)
    try:
        follow_vllm()
        ours.warning("drained")
    finally:
        vllm.removeHandler(handler)
        ours.removeHandler(mine)
    assert own.getvalue() == "drained\n"
    assert not theirs.getvalue()
