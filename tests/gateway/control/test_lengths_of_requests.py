"""What a gateway learns from its requests about the lengths of later ones."""

from dataclasses import replace
from pathlib import Path

from ares.gateway.service import Gateway
from tests.gateway.fakes import FakeInstance
from tests.gateway.gateways import Client, configuration, started
from tests.gateway.running import IMPATIENT
from tests.waiting import eventually

LIMIT = 1000
SHORT_PROMPT, LONG_PROMPT = [1] * 20, [2] * 180


async def expected(gateway: Gateway, fakes: list[FakeInstance], prompt: list[int]) -> tuple[float, float, float]:
    """Return what is expected of a request that has just begun to decode."""
    for fake in fakes:
        fake.hold_at = len(prompt) + 2
    client = Client(gateway, LIMIT, name="asked", prompt=prompt)
    session = await client.reached(1)
    found = gateway.controller.snapshots.remaining(session, None)
    client.task.cancel()
    await eventually(lambda: "asked" not in gateway.sessions)
    for fake in fakes:
        fake.hold_at = None
    return found


def end_at(fakes: list[FakeInstance], tokens: int) -> None:
    for fake in fakes:
        fake.eos_at = tokens


async def learn(gateway: Gateway, fakes: list[FakeInstance], outputs: int) -> None:
    """Let outputs of both kinds of prompts end: the longer the prompt, the shorter its output."""
    end_at(fakes, 200)
    for number in range(outputs):
        for prompt in (SHORT_PROMPT, LONG_PROMPT):
            client = Client(gateway, LIMIT, prompt=[*prompt[:-1], number])
            await client.finish()
            assert abs(len(client.tokens) - (200 - len(prompt))) <= 1


async def test_by_length_curves_prompts_of_two_kinds_separate_after_few_outputs(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    gateway = await started(Gateway(configuration(fakes), model_folder, replace(IMPATIENT, length_curves=True)))
    assert gateway.controller.in_force["lengths"] == "length-curves"
    await learn(gateway, fakes, 4)
    assert 10 < (await expected(gateway, fakes, LONG_PROMPT))[1] < 60
    assert 140 < (await expected(gateway, fakes, SHORT_PROMPT))[1] < 200
    await gateway.stop()


async def test_by_default_all_prompts_are_taken_alike(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    assert gateway.controller.in_force["lengths"] == "residual-life"
    await learn(gateway, fakes, 9)
    short, long = [await expected(gateway, fakes, prompt) for prompt in (SHORT_PROMPT, LONG_PROMPT)]
    for low, _, high in (short, long):
        assert low < 30
        assert high > 150


async def test_a_limit_of_the_client_is_no_evidence_of_short_answers(
    gateway: Gateway, fakes: list[FakeInstance]
) -> None:
    end_at(fakes, 200)
    for _ in range(3):
        await Client(gateway, LIMIT, prompt=SHORT_PROMPT).finish()
    for _ in range(20):
        limited = Client(gateway, 10, prompt=SHORT_PROMPT)
        await limited.finish()
        assert len(limited.tokens) == 10
    assert (await expected(gateway, fakes, SHORT_PROMPT))[1] > 140


async def test_a_client_that_leaves_shows_that_its_output_was_longer(
    gateway: Gateway, fakes: list[FakeInstance]
) -> None:
    for fake in fakes:
        fake.hold_at = 420
    for number in range(6):
        client = Client(gateway, LIMIT, name=f"left{number}", prompt=SHORT_PROMPT)
        await eventually(lambda client=client: len(client.tokens) == 400, 20)
        client.task.cancel()
    await eventually(lambda: not gateway.sessions)
    low, middle, high = await expected(gateway, fakes, SHORT_PROMPT)
    assert 300 < low < middle
    assert high > 800
