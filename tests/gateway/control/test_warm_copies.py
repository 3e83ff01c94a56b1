"""Warm copies over fake instances: what is copied where, and how requests resume by it."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from ares.gateway.control import warm_copies
from ares.gateway.control.prefill_choice import PrefillChoice, cached_tokens
from ares.gateway.control.warm_copies import WarmCopy, warm_copy
from ares.gateway.pool.instance import Instance
from ares.gateway.records.replay import replay
from ares.gateway.service import Gateway
from ares.gateway.session import precopy
from ares.gateway.session.placement import Placement
from ares.gateway.session.precopy import Copied
from ares.gateway.session.session import Session
from ares.gateway.tuning import Tuning
from ares.policy.cluster import IntArray
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import Client, configuration, find, sample, started
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually

PROMPT = list(range(10, 90))  # five full blocks of 16
ON = ["copies.link_bytes_s=1e9", "copies.least_saved_s=0", "copies.least_remaining_tokens=1"]
HELD = 60


@pytest.fixture(autouse=True)
def _prompts_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on an engine: a fake computes them in no time, so that a copy would save none."""
    monkeypatch.setattr(PrefillChoice, "token_s", 0.01)


def decoding(count: int) -> list[Literal["decode"]]:
    return ["decode"] * count


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    *,
    preset: str = "off",
    settings: list[str] = ON,
    tuning: Tuning = IMPATIENT,
    decode: int = 3,
    log: Path | None = None,
) -> AsyncIterator[tuple[Gateway, list[FakeInstance]]]:
    """A prefill and some decode instances, whose outputs stop at `HELD` tokens until they are let go on."""
    async with instances("prefill", *decoding(decode), vocabulary=VOCABULARY) as fakes:
        for fake in fakes[1:]:
            fake.hold_at = len(PROMPT) + HELD
        config = configuration(fakes, preset=preset, settings=settings, period_s=0.02, decision_log=log)
        gateway = await started(Gateway(config, folder, tuning))
        yield gateway, fakes
        for fake in fakes:
            await fake.until(lambda fake=fake: fake.quiet)
            assert len(set(fake.freed)) == len(fake.freed)  # each pin once
        await gateway.stop()


def let_go(fakes: list[FakeInstance]) -> None:
    for fake in fakes:
        fake.hold_at = None


def copy_on(gateway: Gateway) -> WarmCopy:
    return warm_copy(gateway.sessions["request"]) or WarmCopy("", 0)


async def copied(gateway: Gateway, client: Client, tokens: int = 128) -> tuple[str, str]:
    """Wait until so much of a request is copied; return where it runs and where its copy is."""
    session = await client.reached(HELD)
    await eventually(lambda: copy_on(gateway).tokens >= tokens, 20)
    assert session.instance is not None
    return session.instance.name, copy_on(gateway).instance


def fake(fakes: list[FakeInstance], name: str) -> FakeInstance:
    return next(one for one in fakes if one.name == name)


@pytest.mark.parametrize("preset", ["off", "ares", "least-time"])
async def test_after_a_death_the_rest_is_computed_where_the_copy_is(model_folder: Path, preset: str) -> None:
    async with serving(model_folder, preset=preset) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        source, target = await copied(gateway, client)
        prefills = len(fakes[0].asked)
        await fake(fakes, source).die()
        let_go(fakes)
        await client.finish()
        client.check(200)
        assert len(fakes[0].asked) == prefills
        ahead, *_, resumed = fake(fakes, target).asked
        assert ahead["kv_transfer_params"]["ares_ahead"]
        assert ahead["priority"] > 1 << 30, "whatever waits for memory comes first"
        assert "remote_engine_id" not in resumed["kv_transfer_params"]
        assert len(resumed["token_ids"]) >= len(PROMPT) + HELD - 1
        assert sample(gateway, "ares_resumptions_total", where="decode") == 1
        assert sample(gateway, "ares_resumed_cached_tokens_total") >= 128
        assert sample(gateway, "ares_warm_copied_tokens_total") >= 128
        assert sample(gateway, "ares_warm_copied_bytes_total") > 0


async def test_off_copies_nothing(model_folder: Path) -> None:
    async with serving(model_folder, settings=[]) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        session = await client.reached(HELD)
        assert session.instance is not None
        assert copy_on(gateway).tokens == 0
        await fake(fakes, session.instance.name).die()
        let_go(fakes)
        await client.finish()
        client.check(200)
        assert all(not one.copies for one in fakes)
        assert sample(gateway, "ares_resumptions_total", where="prefill") == 1


async def test_an_attempt_that_fails_is_no_resumption(model_folder: Path) -> None:
    async with serving(model_folder) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        source, target = await copied(gateway, client)
        fake(fakes, target).faults.refuse = 500
        await fake(fakes, source).die()
        let_go(fakes)
        await client.finish()
        client.check(200)
        # It runs on the third instance, which had nothing of it cached.
        assert sample(gateway, "ares_resumptions_total", where="decode") == 1
        assert sample(gateway, "ares_resumed_cached_tokens_total") == 0


async def test_prefills_that_fail_are_no_resumptions(model_folder: Path) -> None:
    async with serving(model_folder, settings=[]) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        session = await client.reached(HELD)
        assert session.instance is not None
        fakes[0].faults.refuse = 500
        await fake(fakes, session.instance.name).die()
        let_go(fakes)
        await client.finish()
        client.check(200)
        found = [sample(gateway, "ares_resumptions_total", where=where) for where in ("prefill", "decode")]
        assert found == [0, 1]


async def test_where_nothing_is_cached_a_prefill_instance_computes_it(model_folder: Path) -> None:
    async with serving(model_folder, preset="least-time", settings=[]) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        session = await client.reached(HELD)
        assert session.instance is not None
        await fake(fakes, session.instance.name).die()
        let_go(fakes)
        await client.finish()
        client.check(200)
        found = [sample(gateway, "ares_resumptions_total", where=where) for where in ("prefill", "decode")]
        assert found == [1, 0]
        assert sample(gateway, "ares_resumed_cached_tokens_total") == 0


async def test_logged_copies_are_decided_again(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with serving(model_folder, log=log) as (gateway, fakes):
        clients = [
            Client(gateway, 200, name=name, prompt=[*PROMPT[:-1], n]) for n, name in enumerate(("request", "other"))
        ]
        source, _ = await copied(gateway, clients[0])
        await fake(fakes, source).die()
        let_go(fakes)
        for client in clients:
            await client.finish()
    again = replay(log, None)
    assert again.differences == []
    assert again.logged["copy"] > 1
    assert '"resumption"' in log.read_text()
    assert replay(log, "ares").made["copy"] == 0, "it copies nothing"


async def test_a_copy_whose_instance_dies_is_forgotten_and_made_elsewhere(model_folder: Path) -> None:
    async with serving(model_folder) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        source, target = await copied(gateway, client)
        dead = find(gateway, target)
        await fake(fakes, target).die()
        await eventually(lambda: not dead.health.healthy, 20)
        (third,) = {"decode-0", "decode-1", "decode-2"} - {source, target}
        await eventually(lambda: copy_on(gateway).instance == third, 20)
        await fake(fakes, source).die()
        let_go(fakes)
        await client.finish()
        client.check(200)
        assert sample(gateway, "ares_resumptions_total", where="decode") == 1


async def test_a_restarted_instance_has_no_copy(model_folder: Path) -> None:
    async with serving(model_folder, decode=2) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        source, target = await copied(gateway, client)
        one = fake(fakes, target)
        before = len(fake(fakes, source).copies)
        await one.die()
        await one.start()
        one.hold_at = len(PROMPT) + HELD
        # The whole of it, not only what has come since.
        await eventually(lambda: len(fake(fakes, source).copies) > before, 20)
        await copied(gateway, client)
        let_go(fakes)
        await client.finish()
        client.check(200)


async def test_a_copy_that_fails_costs_nothing_else_and_waits(model_folder: Path) -> None:
    async with serving(model_folder, decode=2) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        session = await client.reached(2)
        assert session.instance is not None
        other = next(one for one in fakes[1:] if one.name != session.instance.name)
        other.faults.fail_pull = True
        await eventually(lambda: sample(gateway, "ares_warm_copies_total", outcome="failed") >= 1, 20)
        tried = len(other.asked)
        let_go(fakes)
        await client.finish()
        client.check(200)
        assert len(other.asked) <= tried + 1, "not again and again"


async def test_an_instance_that_gets_another_name_during_a_copy_is_copied_to_again(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another instance with the same name joins, and leaves."""
    begun, goes_on = list[Instance](), asyncio.Event()

    async def copy_blocks(_: Session, __: Instance, target: Instance, *___: object, **____: object) -> Copied:
        begun.append(target)
        await goes_on.wait()
        return Copied()

    monkeypatch.setattr(precopy, "copy_blocks", copy_blocks)
    async with serving(model_folder, settings=[*ON, "copies.at_once=1"], decode=2) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        await eventually(lambda: bool(begun), 60)
        name, begun[0].name = begun[0].name, "another"
        goes_on.set()
        await eventually(lambda: len(begun) > 1, 60)
        begun[0].name = name
        before = len(begun)
        await eventually(lambda: len(begun) > before, 60)
        let_go(fakes)
        await client.finish()
        client.check(200)


async def test_a_request_that_moves_to_its_copy_is_copied_back(model_folder: Path) -> None:
    async with serving(model_folder, decode=2) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        source, target = await copied(gateway, client)
        session = gateway.sessions["request"]
        fake(fakes, target).hold_at = len(PROMPT) + HELD + 20
        record = await asyncio.wait_for(
            gateway.migrate(session, find(gateway, target), "test", "commanded", "stop_and_copy"), 20
        )
        assert record.outcome == "moved"
        fake(fakes, source).hold_at = None
        session.moved_at = session.commanded_until = 0.0  # it has cooled down
        await eventually(lambda: copy_on(gateway).instance == source, 20)
        let_go(fakes)
        await client.finish()
        client.check(200)


async def test_a_suspended_request_resumes_by_its_copy(model_folder: Path) -> None:
    async with serving(model_folder) as (gateway, fakes):
        client = Client(gateway, 200, prompt=PROMPT)
        await copied(gateway, client)
        prefills = len(fakes[0].asked)
        suspended = asyncio.create_task(gateway.sessions["request"].suspend())
        let_go(fakes)
        assert await suspended in ("suspended", "finished")
        await client.finish()
        client.check(200)
        assert len(fakes[0].asked) == prefills
        assert sample(gateway, "ares_resumptions_total", where="decode") == 1


async def test_a_policy_that_fails_costs_no_request(model_folder: Path) -> None:
    async with serving(model_folder) as (gateway, fakes):

        def broken(*_: Any) -> Any:
            raise RuntimeError("a bug in the policy")

        gateway.controller.warm_copies.decider.policy.decide = broken  # type: ignore[method-assign,assignment]
        client = Client(gateway, 200, prompt=PROMPT)
        await eventually(lambda: sample(gateway, "ares_controller_faults_total", part="copies") >= 2, 20)
        let_go(fakes)
        await client.finish()
        client.check(200)
        assert all(not one.copies for one in fakes)


async def test_streams_go_on_while_it_is_looked_up_what_is_cached(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, looked_up = itertools.count(), list[int]()

    def slowly(placement: Placement, of: Sequence[Instance]) -> IntArray:
        looked_up.append(next(turns))
        time.sleep(0.003)  # as for a request of some hundred thousand tokens
        return cached_tokens(placement, of)

    async def stream() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    async with serving(model_folder) as (gateway, fakes):
        clients = [Client(gateway, 200, name=f"r{n}", prompt=[*PROMPT, n]) for n in range(4)]
        for client in clients:
            await client.reached(HELD - 1)
        monkeypatch.setattr(warm_copies, "cached_tokens", slowly)
        streaming = asyncio.create_task(stream())
        await eventually(lambda: len(looked_up) >= 12, 60)
        streaming.cancel()
        assert all(later > earlier + 1 for earlier, later in itertools.pairwise(looked_up))
        assert gateway.controller.warm_copies.looked_up_s >= 0.003
        let_go(fakes)
        for client in clients:
            await client.finish()
            client.check(200)


async def test_an_instance_that_differs_gets_no_copy(model_folder: Path) -> None:
    async with serving(model_folder, decode=3) as (gateway, fakes):
        odd = fakes[3]
        await odd.die()
        odd.configuration = {"dtype": "float16"}
        for one in fakes[1:3]:
            await one.die()
            one.configuration = {"dtype": "bfloat16"}
            await one.start()
        await odd.start()
        await eventually(lambda: gateway.pool.differing().keys() == {odd.name}, 20)
        client = Client(gateway, 200, prompt=PROMPT)
        source, target = await copied(gateway, client)
        assert {source, target} == {"decode-0", "decode-1"}
        assert not odd.asked
        let_go(fakes)
        await client.finish()
        client.check(200)
