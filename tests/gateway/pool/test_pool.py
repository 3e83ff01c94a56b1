"""One instance behind several URLs: it counts once, and by whichever of them leads to it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gateway.fakes import free_port, instances
from tests.gateway.http.service import serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually


@contextlib.asynccontextmanager
async def another_way(port: int) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A second address of what listens on a port, and what cuts it with all its connections."""
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        writers.extend((writer, ours))
        await asyncio.gather(carry(reader, ours), carry(theirs, writer))

    own = free_port()
    server = await asyncio.start_server(connected, "127.0.0.1", own)

    def cut() -> None:
        server.close()
        for writer in writers:
            writer.transport.abort()

    try:
        yield f"http://127.0.0.1:{own}", cut
    finally:
        cut()


async def test_other_spellings_of_a_url_are_used_once(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with instances("prefill", "decode", vocabulary=VOCABULARY) as fakes:
        port = fakes[1].port
        urls = [fakes[0].url, fakes[1].url, f"{fakes[1].url}/", f"http://localhost:{port}", f"HTTP://LOCALHOST:{port}"]
        async with serving(fakes, model_folder, workers=urls) as service:
            pool = service.gateway.pool
            await eventually(lambda: len(pool.instances) == 2 and pool.ready, 15)
            assert sorted(i.name for i in pool.instances) == ["decode-0", "prefill-0"]
            assert service.gateway.maximum_waiting_tokens == 16 * 1000 * 16
            rows = (await service.client.get("/admin/v1/status")).json()["instances"]
            assert sorted(row["name"] for row in rows) == ["decode-0", "prefill-0"]
            metrics = (await service.client.get("/metrics")).text
            assert metrics.count("ares_instance_up{") == 2
            assert (await service.complete()).status_code == 200
            await asyncio.sleep(0.5)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    twice = [record.getMessage() for record in told if "is the same" in record.getMessage()]
    # As given, and by what the instance says of itself: one line for each of the URLs.
    assert len(twice) == 3
    assert len(set(twice)) == 3


async def test_two_workers_of_one_name_are_two(model_folder: Path) -> None:
    async with instances("decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            await fake.die()
            fake.name = "twin"
            await fake.start()
        async with serving(fakes, model_folder) as service:
            await eventually(lambda: all(i.open for i in service.gateway.pool.instances), 15)
            assert sorted(i.name for i in service.gateway.pool.instances) == sorted(
                f"twin@127.0.0.1:{fake.port}" for fake in fakes
            )


@pytest.mark.parametrize("busy", [False, True], ids=["at rest", "under a stream"])
async def test_where_the_first_url_breaks_the_other_one_is_used(model_folder: Path, busy: bool) -> None:
    """Its telemetry goes on: only requests notice."""
    async with (
        instances("both", vocabulary=VOCABULARY) as fakes,
        another_way(fakes[0].port) as (way, cut),
        serving(fakes, model_folder, replace(IMPATIENT, duplicate_check_s=0.2), workers=[way, fakes[0].url]) as service,
    ):
        pool = service.gateway.pool
        await eventually(lambda: len(pool.instances) == 1 and pool.ready, 15)
        fakes[0].hold_at = 10 if busy else None
        running = asyncio.create_task(service.complete())
        await eventually(lambda: not busy or bool(fakes[0].running), 15)
        # Whichever was first, the way breaks.
        cut()
        if not busy:
            assert (await running).status_code == 200
        replies = [asyncio.create_task(service.complete(max_tokens=3)) for _ in range(3)]
        assert [(await reply).status_code for reply in replies] == [200] * 3
        fakes[0].hold_at = None
        assert (await running).status_code == 200
        await eventually(lambda: [i.url for i in pool.instances if i.open] == [fakes[0].url], 15)


async def test_an_engine_without_its_http_server_gets_nothing_and_is_told(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its control channel goes on: the API server of a real engine may die alone."""
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        another_way(fakes[1].port) as (url, cut),
    ):
        urls = [fakes[0].url, url, fakes[2].url]
        async with serving(fakes, model_folder, workers=urls, preset="off") as service:
            pool = service.gateway.pool
            half = next(i for i in pool.instances if i.url == url)
            await eventually(lambda: all(i.open for i in pool.instances))
            cut()
            with caplog.at_level(logging.WARNING, "ares.gateway.pool.instance"):
                for _ in range(2):  # in turns: one of them goes there
                    assert (await service.complete()).status_code == 200
                for _ in range(20):
                    assert not half.open
                    await asyncio.sleep(0.05)
            assert half.state.telemetry is not None
            assert sum("is lost: connection refused" in line for line in caplog.messages) == 1


async def test_a_worker_that_restarts_is_still_one(model_folder: Path) -> None:
    async with instances("both", vocabulary=VOCABULARY) as fakes:
        urls = [fakes[0].url, f"http://localhost:{fakes[0].port}"]
        async with serving(fakes, model_folder, replace(IMPATIENT, duplicate_check_s=0.2), workers=urls) as service:
            pool = service.gateway.pool
            for _ in range(3):
                await eventually(lambda: len(pool.instances) == 1 and pool.ready, 15)
                assert (await service.complete()).status_code == 200
                await fakes[0].die()
                await eventually(lambda: not pool.ready, 15)
                await fakes[0].start()
            await eventually(lambda: len(pool.instances) == 1 and pool.ready, 15)
