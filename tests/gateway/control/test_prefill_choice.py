"""The choice of where a prompt is computed, and what it keeps from one preset to the next."""

from pathlib import Path
from weakref import WeakKeyDictionary

import msgspec
import pytest

from ares.gateway.control.prefill_choice import PrefillChoice
from ares.gateway.control.prefill_queue import PrefillQueue
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.instance import Instance
from ares.gateway.service import Gateway
from ares.gateway.session.output import Output
from ares.gateway.session.placement import Placement
from ares.policy import prefill_policy
from tests.gateway.fakes import instances
from tests.gateway.gateways import Client, configuration, find, started
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually


def placement() -> Placement:
    return Placement(
        prompt=[5] * 40,
        sampling=Sampling({}, 5),
        output=Output(),
        choose_prefill=lambda *_: None,
        gateway="gateway",
        maximum_attempts=1,
    )


async def test_a_prompt_that_ends_under_another_preset_is_queued_no_more(model_folder: Path) -> None:
    async with instances("prefill", "decode", vocabulary=VOCABULARY) as fakes:
        gateway = await started(Gateway(configuration(fakes), model_folder))
        instance, queues, request = find(gateway, "prefill-0"), WeakKeyDictionary[Instance, PrefillQueue](), placement()
        before = PrefillChoice(prefill_policy("least_time"), None, queues, sees_prefixes=True)
        before.choose(request, [instance], [])
        assert len(queues[instance]) == 1
        after = PrefillChoice(prefill_policy("fewest_requests"), None, queues, sees_prefixes=False)
        after.ended(request, instance)
        assert len(queues[instance]) == 0
        await gateway.stop()


@pytest.mark.parametrize("broken", [False, True])
async def test_prompts_that_come_at_once_are_shared_out(
    model_folder: Path, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them come before the next telemetry: what was sent counts as well, also where the policy fails."""
    async with instances("prefill", "prefill", "decode", vocabulary=VOCABULARY) as fakes:
        gateway = await started(Gateway(configuration(fakes), model_folder))
        busy, idle = find(gateway, "prefill-0"), find(gateway, "prefill-1")
        assert busy.state.telemetry is not None
        busy.state.telemetry = msgspec.structs.replace(busy.state.telemetry, running=1, waiting=2)
        policy = gateway.controller.prefills.decider.policy
        if broken:
            monkeypatch.setattr(policy, "choose", lambda places, tokens: 1 / 0)
        requests = [placement() for _ in range(43)]
        chosen = [gateway.controller.choose_prefill(request, None) for request in requests]
        assert chosen.count(idle) - chosen.count(busy) == 3
        await gateway.stop()


@pytest.mark.parametrize("weight", [0, 1])
async def test_what_was_sent_counts_where_dispatch_alone_looks_at_it(model_folder: Path, weight: int) -> None:
    """Instances that publish no KV events."""
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        settings = [f"dispatch.cached_weight={weight}"]
        config = configuration(fakes, preset="static-least-loaded", settings=settings)
        gateway = await started(Gateway(config, model_folder))
        await Client(gateway, 5, prompt=[5] * 64).finish()
        known = [len(i.state.cached) for i in gateway.pool.instances]
        assert (max(known) >= 4) == bool(weight)
        await gateway.stop()


async def test_a_place_is_chosen_for_one_admission(model_folder: Path) -> None:
    """A request that is admitted again later goes where dispatch says, not where its prompt was computed."""
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        gateway = await started(Gateway(configuration(fakes, preset="least-time"), model_folder))
        policy = gateway.controller.prefills.decider.policy
        policy.choose = lambda places, tokens: len(places.instances) - 1  # type: ignore[method-assign]
        clients = [Client(gateway, 200, name=f"request{number}") for number in range(3)]
        session, *_ = [await client.reached(1) for client in clients]
        assert [len(fake.running) for fake in fakes] == [0, 0, 3]
        await eventually(lambda: session.unmovable_now() is None)
        assert await session.suspend() == "suspended"
        await eventually(lambda: session.instance is not None and session.unmovable_now() is None)
        assert session.instance is find(gateway, "decode-0")
        for client in clients:
            await client.finish()
            client.check(200)
        await gateway.stop()


async def test_what_was_sent_to_a_decode_instance_takes_its_room(model_folder: Path) -> None:
    """All prompts come before its next report, which shows none of them."""
    async with instances("prefill", "decode", vocabulary=VOCABULARY) as fakes:
        gateway = await started(Gateway(configuration(fakes, preset="least-time", slo_tpot_s=100.0), model_folder))
        decode, prefill = find(gateway, "decode-0"), find(gateway, "prefill-0")
        assert decode.state.hello is not None
        queued = [placement() for _ in range(200)]
        for request in queued:
            gateway.controller.prefills.choose(request, [prefill], [])
        free_tokens = decode.state.free_blocks * decode.state.hello.block_size
        requests = [placement() for _ in range(3 * free_tokens // 40)]
        for request in requests:
            gateway.controller.choose_prefill(request, None)
        sent = [request for request in requests if request.computes_on is decode]
        assert 0 < len(sent) * 40 <= free_tokens // 2
        await gateway.stop()
