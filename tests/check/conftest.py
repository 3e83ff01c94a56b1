"""Checks of mock instances in this process."""

from typing import Any

import pytest

from ares.check.rows import Outcome, Row
from ares.check.run import Plan, Report, run
from tests.mock_engine.cluster import Cluster


def plan(*clusters: Cluster, **changes: Any) -> Plan:
    """A short check of all instances of these clusters; outputs do not end before a busy machine has moved them."""
    urls = [server.url for cluster in clusters for server in cluster.servers.values()]
    return Plan(**({"urls": urls, "outputs": 2, "tokens": 160, "step_s": 30.0} | changes))


async def checked(*clusters: Cluster, **changes: Any) -> Report:
    return await run(plan(*clusters, **changes))


def row(report: Report, check: str) -> Row:
    (found,) = [each for each in report.rows if f"{each.check} ".startswith(f"{check} ")]
    return found


def outcomes(report: Report, group: str) -> dict[str, Outcome]:
    return {each.check: each.outcome for each in report.rows if each.group == group}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
