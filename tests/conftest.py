"""For all tests."""

import faulthandler
import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

from ares import free_ports

# How long a case takes says nothing on a machine that does other work; pytest's own limit catches what hangs.
settings.register_profile("ares", deadline=None)
settings.load_profile("ares")

# A shell starts what it puts into the background with Ctrl-C ignored; tests of Ctrl-C must not depend on it.
_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}

# Two threads of torch, or of a BLAS, that share a core with others' work wait for each other at every small operation:
# the predictor's networks train ten times more slowly so. To be set before torch is imported; processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The clients that tests ask with take a proxy of this machine for loopback as well, unless told otherwise.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost", "::1"]))


def _own_ports(worker: str) -> range:
    """Return this process' share of the ports: another process could listen on one between its choice and its use."""
    number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    each = len(free_ports.candidates) // count
    return free_ports.candidates[number * each : (number + 1) * each]


if "PYTEST_XDIST_WORKER" in os.environ:
    free_ports.candidates = _own_ports(os.environ["PYTEST_XDIST_WORKER"])

_AFTER_TIMEOUT_S = 30
_errors = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the error output, which tests have captured."""
    config.stash[_errors] = os.dup(2)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Begin with the default signal handlers; end the process where a test does not end by its timeout.

    A command that a test calls in this process replaces the handlers, and its first Ctrl-C is its last.

    pytest-timeout raises in the main thread. Where a callback of an event loop runs there at that moment, the loop logs
    the exception and the test waits for ever. So the process ends, with the stack of every thread.
    """
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)
    marker = item.get_closest_marker("timeout")
    limit_s = float(marker.args[0] if marker and marker.args else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit_s + _AFTER_TIMEOUT_S, file=item.config.stash[_errors], exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show why a test ran twice: its first try is not among the failures."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"first try of {report.nodeid}")
        terminalreporter.line(report.longreprtext)
