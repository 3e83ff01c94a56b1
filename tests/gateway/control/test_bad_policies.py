"""A dispatch or admission policy that fails, decides nonsense or takes too long costs its decisions and nothing else.

Of rebalance policies, test_decider.py says the same.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ares.gateway.records.replay import replay
from ares.gateway.tuning import Tuning
from ares.policy import (
    ADMISSIONS,
    DISPATCHERS,
    Admission,
    AdmissionDecision,
    Candidates,
    Cluster,
    Dispatch,
    Progress,
    register,
)
from tests.gateway.gateways import Client, cluster, finish, sample

REQUESTS = 4


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    """Two policies of a user's own; what they do is said by each test."""

    @register("own-dispatch")
    class OwnDispatch(Dispatch):
        def choose(self, cluster: Cluster, tokens: int, remaining: Any) -> Any:
            return int(cluster.open.argmax())

    @register("own-admission")
    class OwnAdmission(Admission):
        def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> Any:
            return enter(cluster, candidates)

    yield
    DISPATCHERS.forget(["own-dispatch"])
    ADMISSIONS.forget(["own-admission"])


def enter(cluster: Cluster, candidates: Candidates, instance: Any = None, times: int = 1) -> list[AdmissionDecision]:
    place = int(cluster.open.argmax()) if instance is None else instance
    return [AdmissionDecision("admit", n, place, "it is there") for n in range(len(candidates.tokens))] * times


def closed(cluster: Cluster) -> int:
    return int(cluster.open.argmin())


def raises(*_: Any) -> Any:
    raise RuntimeError("a bug in the policy")


DISPATCHES: dict[str, Callable[..., Any]] = {
    "raised": raises,
    "unknown_instance": lambda *_: 99,
    "closed_instance": lambda view, *_: closed(view),
    "no_instance": lambda *_: None,
}
ENTRIES: dict[str, Callable[..., Any]] = {
    "raised": raises,
    "not_decisions": lambda *_: None,
    "unknown_instance": lambda view, outside, _: enter(view, outside, 99),
    "closed_instance": lambda view, outside, _: enter(view, outside, closed(view)),
    "repeated": lambda view, outside, _: enter(view, outside, times=2),
    "unknown_request": lambda *_: [AdmissionDecision("admit", 99, 0, "x")],
    "unknown_kind": lambda *_: [AdmissionDecision("leave", 0, 0, "x")],  # type: ignore[arg-type]
    "wrong_kind": lambda *_: [AdmissionDecision("resume", 0, 1, "x")],
    "reason": lambda *_: [AdmissionDecision("admit", 0, 1, "")],
}


async def serve(folder: Path, preset: Path, **settings: Any) -> Any:
    """Serve a few requests, with the first decode instance closed to new ones; return the gateway."""
    async with cluster(folder, kv_blocks=200, preset=str(preset), **settings) as (gateway, _):
        gateway.pool.instances[1].state.draining = True
        clients = [Client(gateway, 60, name=f"r{n}", prompt=[10 + n] * 20) for n in range(REQUESTS)]
        await finish(clients)
        part = "dispatch" if "dispatch" in preset.stem else "admission"
        decider = getattr(gateway.controller, f"{part}_decider")
        return decider, sample(gateway, "ares_controller_faults_total", part=part)


def preset(folder: Path, part: str) -> Path:
    file = folder / f"{part}.yaml"
    file.write_text(f"{part}: own-{part}\n")
    return file


@pytest.mark.parametrize(("decide", "kind"), [(does, kind) for kind, does in DISPATCHES.items()] + [
    (lambda *_: float("nan"), "unknown_instance"), (lambda *_: True, "unknown_instance")])  # fmt: skip
async def test_bad_dispatch(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, decide: Callable[..., Any], kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(DISPATCHERS["own-dispatch"], "choose", lambda self, *given: decide(*given))
    decider, faults = await serve(model_folder, preset(tmp_path, "dispatch"))
    assert decider.faults == {kind: REQUESTS}
    assert faults == REQUESTS
    assert sum("dispatch policy 'own-dispatch'" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(("decide", "kind"), [(does, kind) for kind, does in ENTRIES.items()] + [
    (lambda *_: [AdmissionDecision("admit", float("nan"), 0, "x")], "unknown_request"),  # type: ignore[arg-type]
    (lambda *_: [AdmissionDecision("suspend", 99, 0, "x")], "unknown_request")])  # fmt: skip
async def test_bad_admission(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, decide: Callable[..., Any], kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ADMISSIONS["own-admission"], "decide", lambda self, *given: decide(*given))
    decider, faults = await serve(model_folder, preset(tmp_path, "admission"))
    assert set(decider.faults) == {kind}
    assert decider.faults[kind] == faults > 0
    assert sum("admission policy 'own-admission'" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(("part", "method"), [("dispatch", "choose"), ("admission", "decide")])
async def test_one_that_does_not_answer_is_done_without(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, method: str
) -> None:
    go = threading.Event()
    registry: Any = {"dispatch": DISPATCHERS, "admission": ADMISSIONS}[part]
    monkeypatch.setattr(registry[f"own-{part}"], method, lambda *_: go.wait(60))
    try:
        decider, faults = await serve(model_folder, preset(tmp_path, part), tuning=Tuning(decision_s=0.05))
    finally:
        go.set()
    assert set(decider.faults) == {"late"}
    assert faults >= 1


@pytest.mark.parametrize("part", ["dispatch", "admission"])
async def test_good_ones_decide_and_are_made_again(model_folder: Path, tmp_path: Path, part: str) -> None:
    log = tmp_path / "log"
    _, faults = await serve(model_folder, preset(tmp_path, part), decision_log=log)
    assert faults == 0
    again = replay(log, None)
    assert again.decisions == again.same >= 1
    assert again.made[{"dispatch": "place", "admission": "admit"}[part]] == REQUESTS
    assert replay(log, "static-least-loaded").decisions == again.decisions
