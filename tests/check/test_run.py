"""`ares check` on mock engines: a healthy cluster passes, and each planted fault is found where it is."""

import asyncio
import time

import msgspec
import pytest

from ares.check import transfers
from ares.check.rows import Outcome
from ares.check.run import run
from ares.free_ports import free_port
from ares.gateway.pool.discovery import Served
from ares.protocol.fields import CONTROL_KEY_VARIABLE
from ares.protocol.keys import ControlKey
from tests.check.conftest import checked, outcomes, plan, row
from tests.http_server import answering
from tests.mock_engine.cluster import Cluster, serving, settings
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(240)
ROLES = ("prefill", "decode", "decode")
KEY = "a control key that has more than 32 characters"


def plant(cluster: Cluster, instance: str, **faults: object) -> None:
    cluster.instance(instance).faults.change(msgspec.json.encode(faults))


async def test_a_healthy_cluster_passes_and_is_left_as_it_was() -> None:
    async with serving(settings(), *ROLES) as cluster:
        report = await checked(cluster)
        await cluster.at_rest()
        assert cluster.counters("decode-0")["cut"] == 2
    assert not report.failed
    # Times are those of this machine, which may do other work.
    timed = {"time a token", "stall of a move (stop_and_copy)"}
    assert {each.outcome for each in report.rows if each.check not in timed} == {Outcome.PASS, Outcome.NOT_RUN}
    assert outcomes(report, transfers.GROUP) == dict.fromkeys(
        (
            "prefill-0 -> decode-0",
            "prefill-0 -> decode-1",
            "decode-0 -> decode-1",
            "decode-1 -> decode-0",
            "all pairs",
        ),
        Outcome.PASS,
    )
    assert row(report, "stall of a move").figures["moves"] == 4
    assert [each["name"] for each in report.instances] == ["prefill-0", "decode-0", "decode-1"]


@pytest.mark.parametrize(
    ("source", "failing"),
    [
        ("prefill-0", {"prefill-0 -> decode-0", "prefill-0 -> decode-1"}),
        ("decode-1", {"decode-1 -> decode-0"}),
    ],
)
async def test_wrong_tokens_are_found_on_the_pair_that_makes_them(source: str, failing: set[str]) -> None:
    async with serving(settings(), *ROLES) as cluster:
        plant(cluster, source, wrong_kv=True)
        report = await checked(cluster)
    found = outcomes(report, transfers.GROUP)
    assert {check for check, outcome in found.items() if outcome is Outcome.FAIL} == failing | {"all pairs"}
    one = row(report, next(iter(failing)))
    assert "2 of 2 outputs differ" in one.value
    assert "do not move requests" in one.advice


async def test_a_target_that_computes_the_kv_itself_has_not_passed() -> None:
    """Its tokens are right: only the report of the pull shows that nothing was transferred."""
    async with serving(settings(lease_s=0.001), *ROLES) as cluster:
        report = await checked(cluster)
    found = outcomes(report, transfers.GROUP)
    assert found["prefill-0 -> decode-0"] is Outcome.FAIL
    assert "pulled no KV" in row(report, "prefill-0 -> decode-0").value


async def test_an_instance_of_another_model_is_left_out_and_named() -> None:
    async with (
        serving(settings(), "prefill", "decode") as cluster,
        serving(settings(names=("other/model",)), "both") as other,
    ):
        report = await checked(cluster, other)
        given = await checked(other, served=Served(("some/model",)))
    found = row(report, "both-0")
    assert found.outcome is Outcome.FAIL
    assert "another model: other/model instead of some/model" in found.value
    assert row(report, "prefill-0 -> decode-0").outcome is Outcome.PASS
    assert row(report, "decode -> decode").outcome is Outcome.NOT_RUN
    assert row(given, "both-0").outcome is Outcome.FAIL
    assert given.instances == []


async def test_an_instance_of_another_version_and_block_size_is_named() -> None:
    """The profile stands for vLLM's version on a mock engine."""
    async with (
        serving(settings(), "prefill", "decode") as cluster,
        serving(settings(name="another", block_size=32), "both") as other,
    ):
        report = await checked(cluster, other, outputs=1)
    for check, value in (("vLLM", "profile another): both-0"), ("KV block size", "32: both-0")):
        assert row(report, check).outcome is Outcome.FAIL
        assert value in row(report, check).value


async def test_what_cannot_be_reached_or_is_no_instance_has_a_row_with_the_reason() -> None:
    nothing = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    async with serving(settings(), *ROLES) as cluster:
        with answering(lambda _: (404, b"")) as plain:
            urls = [server.url for server in cluster.servers.values()]
            report = await run(plan(urls=[*urls, nothing, plain]))
    assert row(report, nothing).outcome is Outcome.FAIL
    assert "connection refused" in row(report, nothing).value
    assert "start it" in row(report, nothing).advice
    assert "is not an ARES instance" in row(report, plain).value
    assert row(report, "all pairs").outcome is Outcome.PASS


async def test_without_any_instance_the_rest_is_not_run() -> None:
    report = await run(plan(urls=[f"http://127.0.0.1:{free_port('127.0.0.1')}"]))
    assert report.failed
    assert [each.outcome for each in report.rows[1:]] == [Outcome.NOT_RUN] * (len(report.rows) - 1)


async def test_a_control_key_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONTROL_KEY_VARIABLE, KEY)
    async with serving(settings(), "both", control_key=ControlKey(KEY)) as cluster:
        without = await checked(cluster)
        with_key = await checked(cluster, control_key=ControlKey(KEY))
    assert "--control-key-file" in row(without, "both-0").advice + row(without, "both-0").value
    assert row(without, "both-0").outcome is Outcome.FAIL
    assert row(with_key, "both-0").outcome is Outcome.PASS


async def test_a_slow_instance_is_named() -> None:
    async with serving(settings(), "decode", "decode", "decode") as cluster:
        plant(cluster, "decode-2", slow=8)
        report = await checked(cluster, outputs=1)
    slow = row(report, "time a token")
    assert slow.outcome is Outcome.WARN
    assert slow.advice.startswith("decode-2:")
    assert not report.failed


async def test_instances_that_freeze_end_their_checks_by_the_limit() -> None:
    async with serving(settings(), "decode", "decode") as cluster:
        checking = asyncio.create_task(checked(cluster, step_s=2.0))
        await eventually(lambda: cluster.counters("decode-0")["cut"] > 0)
        plant(cluster, "decode-1", freeze_s=60)
        began = time.monotonic()
        report = await checking
        took_s = time.monotonic() - began
        cluster.instance("decode-1").faults.thaw()
    failed = [each for each in report.rows if each.outcome is Outcome.FAIL]
    assert any("did not end within 2 s" in each.value for each in failed), failed
    assert took_s < 60


async def test_a_check_after_the_time_limit_is_not_run() -> None:
    async with serving(settings(), *ROLES) as cluster:
        report = await checked(cluster, total_s=0.01)
    assert row(report, "decode-0 -> decode-1").outcome is Outcome.NOT_RUN
    assert "0.01 s" in row(report, "decode-0 -> decode-1").value
