"""What the chaos suite's gateway is told about real engines, and what it logs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import aiohttp
import msgspec
import pytest

from ares.gateway.pool.pool import Pool
from ares.gateway.records.decision_log import DecisionLog
from ares.policy import PRESETS
from ares.protocol import messages, rpc
from ares_dev.chaos import gateway, telemetry_faults
from ares_dev.chaos.observe import Observer

ROWS = [messages.Row("a/1/1", 300, 7, "running", (1.0, 2.0, 3.0)), messages.Row("a/2/1", 0, 0, "waiting")]
LOAD = messages.Telemetry(
    5, 40, 1, 1, 2, 0.01, 100, 0, ROWS, resources={"worker.leases": 2, "worker.remote_engines": 1}
)


def altered(injector: telemetry_faults.TelemetryFaultInjector, load: messages.Event = LOAD) -> Any:
    message = injector.altered("decode-0", 128, rpc.encode(load))
    return rpc.decode_event(message) if message is not None else None


def test_nothing_is_changed_but_on_command() -> None:
    injector = telemetry_faults.TelemetryFaultInjector()
    assert altered(injector) == LOAD
    injector.change("decode-1", b'{"telemetry":"silent"}')
    assert altered(injector) == LOAD


@pytest.mark.parametrize(
    ("lie", "changes"),
    [
        ("empty", {"kv_blocks_used": 0, "running": 0, "waiting": 0, "pinned": 0, "rows": []}),
        ("full", {"kv_blocks_used": 128}),
    ],
)
def test_lies_about_the_load(lie: str, changes: dict[str, Any]) -> None:
    injector = telemetry_faults.TelemetryFaultInjector()
    injector.change("decode-0", b'{"telemetry":"%s"}' % lie.encode())
    assert altered(injector) == msgspec.structs.replace(LOAD, **changes)
    injector.change("decode-0", b'{"telemetry":null,"refuse":false}')
    assert altered(injector) == LOAD


def test_a_load_that_stands_still_is_that_of_the_beginning() -> None:
    injector = telemetry_faults.TelemetryFaultInjector()
    later = msgspec.structs.replace(LOAD, sequence=6, running=9)
    for first in (LOAD, msgspec.structs.replace(LOAD, running=4)):
        injector.change("decode-0", b'{"telemetry":"constant"}')
        assert altered(injector, first) == first
        assert altered(injector, later) == msgspec.structs.replace(first, sequence=6)
        injector.change("decode-0", b'{"telemetry":null}')
        assert altered(injector, later) == later


def test_what_cannot_be_is_no_message() -> None:
    injector = telemetry_faults.TelemetryFaultInjector()
    injector.change("decode-0", b'{"telemetry":"absurd"}')
    with pytest.raises(msgspec.DecodeError):
        altered(injector)


def test_silence_is_that_of_telemetry_only() -> None:
    injector = telemetry_faults.TelemetryFaultInjector()
    injector.change("decode-0", b'{"telemetry":"silent"}')
    assert altered(injector) is None
    answer = messages.LeaseResult(1, "a", True)
    assert altered(injector, answer) == answer


def test_predictions_of_what_runs() -> None:
    injector = telemetry_faults.TelemetryFaultInjector()
    injector.change("decode-0", b'{"predictions":"negative"}')
    assert [row.remaining for row in altered(injector).rows] == [(-300.0, -200.0, -100.0), None]


async def test_an_instance_hears_lies() -> None:
    injector = telemetry_faults.TelemetryFaultInjector()
    async with aiohttp.ClientSession() as http:
        pool = Pool(["http://127.0.0.1:9"], http, 0.1)
        telemetry_faults.install(injector, pool)
        (instance,) = pool.instances
        instance.name = "decode-0"
        for lie, running in (("silent", None), ("empty", 0), ("absurd", 0)):
            injector.change("decode-0", b'{"telemetry":"%s"}' % lie.encode())
            await instance.receive(rpc.encode(LOAD), pool.connect_peers)
            assert (instance.state.telemetry and instance.state.telemetry.running) == running
        injector.change("decode-0", b'{"telemetry":null}')
        await instance.receive(rpc.encode(LOAD), pool.connect_peers)
        assert instance.state.telemetry == LOAD


def test_of_many_decisions_some_are_logged(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log")
    gateway.log_one_of(log, 3)
    rebalance = PRESETS["ares"].make()[2]
    for n in range(60):
        view: Any = SimpleNamespace(sessions=["a request"], cluster={"n": n}, running=None)
        decided: Any = ["a move"] if n % 20 == 19 else []
        log.moves("ares", view, rebalance, None, [], decided)
    log.close()
    logged = [msgspec.json.decode(line) for line in (tmp_path / "log").read_bytes().splitlines()]
    assert sum(not one["decided"] for one in logged) == 57 / 3
    # The few that decide something are not left to chance.
    assert [one["cluster"]["n"] for one in logged if one["decided"]] == [19]


def test_decisions_fail_by_their_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(dispatches: int) -> list[bool]:
        for name in ("prefill_policy", "dispatcher", "admission_policy", "copier"):
            monkeypatch.setattr(gateway.controller, name, lambda *_: Mock())
        monkeypatch.setattr(gateway.role_planner, "role_policy", lambda *_: Mock())
        for name in ("rebalancer", "avoid_oom"):
            monkeypatch.setattr(gateway.rebalancing, name, lambda *_: Mock())
        gateway.install(7, 0.5)
        names = {**vars(gateway.controller), **vars(gateway.rebalancing)}
        found = []
        for kind in ["dispatcher"] * dispatches + ["rebalancer"] * 20:
            try:
                asked = names[kind]("any")
                asked.decide() if kind == "rebalancer" else asked.choose()
                found.append(False)
            except gateway.InjectedError:
                found.append(True)
        return found[dispatches:]

    assert failing(0) == failing(13)
    assert len(set(failing(0))) == 2


def test_what_a_real_engine_tells() -> None:
    observer = Observer("decode-0", "http://127.0.0.1:9", None)  # type: ignore[arg-type] # it asks nobody
    assert observer.counters() is None
    observer.take(rpc.encode(LOAD))
    heard = observer.counters()
    assert heard is not None
    assert heard["generating"] == ["a/1/1"]
    # What connects engines stays; what belongs to requests must not.
    assert heard["worker.leases"] == 2
    assert "worker.remote_engines" not in heard
    observer.take(rpc.encode(msgspec.structs.replace(LOAD, kv_blocks_used=-1)))
    (malformed,) = observer.malformed
    assert "kv_blocks_used" in malformed
