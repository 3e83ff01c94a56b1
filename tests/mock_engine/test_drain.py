"""SIGTERM to instances that are processes of their own: they empty first, and a pool restarts without a failure."""

import asyncio
import signal
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest

from ares.gateway.control.controller import Controller
from ares.mock_engine import model as mock_model
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.mock_engine.processes import gateway_over, generate, workers
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(300)
PROMPT = list(range(10, 60))


async def test_a_pool_restarts_under_load_without_one_failure(model_folder: Path) -> None:  # noqa: F811
    model = mock_model.load(model_folder)
    with workers(model_folder, 3) as made:
        async with gateway_over(made, model_folder) as gateway:
            stopping = asyncio.Event()
            done = 0

            async def client(number: int) -> None:
                nonlocal done
                for turn in range(1000):
                    if stopping.is_set():
                        return
                    prompt = [10 + number, 10 + turn % 200, *PROMPT]
                    assert await generate(gateway, f"{number}-{turn}", prompt, 150) == model.continuation(prompt, 150)
                    done += 1

            clients = [asyncio.create_task(client(number)) for number in range(12)]
            for port in made.ports:
                instance = gateway.pool.find(f"w{port}")
                before = instance.state.hello.boot
                await eventually(lambda i=instance: any(s.instance is i for s in gateway.sessions.values()))
                made.processes[port].send_signal(signal.SIGTERM)
                assert await made.ended(port) == 0
                made.start(port)
                await eventually(lambda i=instance, b=before: i.open and i.state.hello and i.state.hello.boot != b, 120)
            stopping.set()
            await asyncio.gather(*clients)
            assert done > 12
            assert gateway.metrics.registry.get_sample_value(
                "ares_migrations_total", {"trigger": "drain", "outcome": "moved"}
            )


async def test_it_is_not_ready_but_well_until_its_deadline(model_folder: Path) -> None:  # noqa: F811
    with workers(model_folder, 1) as made:
        port = made.ports[0]
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=120) as http, gateway_over(made, model_folder) as gateway:
            assert (await http.get("/ares/v1/ready")).status_code == 200
            # There is nowhere to go: the request stays.
            running = asyncio.create_task(generate(gateway, "stays", PROMPT, 10_000))
            await eventually(lambda: any(len(s.emitted) > 5 for s in gateway.sessions.values()))
            made.processes[port].send_signal(signal.SIGTERM)
            instance = gateway.pool.instances[0]
            await eventually(lambda: instance.state.draining)
            assert (await http.get("/ares/v1/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
            assert not running.done()
            assert gateway.drainer.left(instance) == 1
            # A second one ends it at once.
            made.processes[port].send_signal(signal.SIGTERM)
            assert await made.ended(port) == 0
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_what_cannot_move_leaves_before_it_ends(
    model_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that it is no loss of an instance, which a request survives a few times only."""
    monkeypatch.setattr(Controller, "choose_decode", AsyncMock(return_value=None))
    with workers(model_folder, 2, "--drain-deadline", "4") as made:
        async with gateway_over(made, model_folder) as gateway:
            runs = [asyncio.create_task(generate(gateway, str(n), [10 + n, *PROMPT], 400)) for n in range(4)]
            leaving = gateway.pool.find(f"w{made.ports[0]}")
            await eventually(lambda: any(s.instance is leaving and s.emitted for s in gateway.sessions.values()))
            sequences = list(gateway.sessions.values())
            made.processes[made.ports[0]].send_signal(signal.SIGTERM)
            await eventually(lambda: not any(s.instance is leaving for s in sequences))
            assert made.processes[made.ports[0]].poll() is None
            assert await made.ended(made.ports[0]) == 0
            model = mock_model.load(model_folder)
            assert await asyncio.gather(*runs) == [model.continuation([10 + n, *PROMPT], 400) for n in range(4)]
            assert [s.losses for s in sequences] == [0] * 4


async def test_a_deadline_ends_it(model_folder: Path) -> None:  # noqa: F811
    with workers(model_folder, 1, "--drain-deadline", "0.5") as made:
        port = made.ports[0]
        async with gateway_over(made, model_folder) as gateway:
            running = asyncio.create_task(generate(gateway, "stays", PROMPT, 10_000))
            await eventually(lambda: any(len(s.emitted) > 5 for s in gateway.sessions.values()))
            made.processes[port].send_signal(signal.SIGTERM)
            assert await made.ended(port) == 0
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
