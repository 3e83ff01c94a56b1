"""Instances that cannot be used: what the log, the status and `/ready` say of each."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ares.gateway.pool.discovery import Served, another_model
from ares.protocol import messages
from tests.gateway.fakes import FakeInstance, free_port, instances
from tests.gateway.http.service import MODEL, serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually

KEY, OTHER_KEY = "k" * 32, "o" * 32


def said(*names: str, **shape: int) -> messages.Description:
    return messages.Description("d0", "decode", "boot", "tcp://127.0.0.1:1", list(names), shape)


SHAPE = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30}


@pytest.mark.parametrize(
    ("theirs", "ours", "wrong"),
    [
        (said("org/model"), Served(("org/model",)), None),
        (said("alias", "org/model"), Served(("org/model",)), None),
        (said("Org/MODEL"), Served(("org/model",)), None),
        (said("org/other"), Served(("org/model",)), "org/other instead of org/model"),
        # A folder is a place on its own host.
        (said("/models/x", **SHAPE), Served(("org/model",), SHAPE), None),
        (said("org/model", **SHAPE), Served(("/srv/x",), SHAPE), None),
        (said("/models/x"), Served(("/srv/y",)), None),
        (said("/models/x", "alias"), Served(("org/model",)), "alias instead of org/model"),
        # The numbers count whatever the names are.
        (said("org/model", **SHAPE | {"hidden_size": 960}), Served(("org/model",), SHAPE), "hidden_size 960"),
        (said("/models/x", vocab_size=32000), Served(("/srv/x",), SHAPE), "vocab_size 32000"),
        (said("org/model", vocab_size=49152), Served(("org/model",)), None),
        (said("org/model"), Served(("org/model",), SHAPE), None),
        # One of an earlier version says nothing.
        (said(), Served(("org/model",), SHAPE), None),
    ],
)
def test_another_model(theirs: messages.Description, ours: Served, wrong: str | None) -> None:
    found = another_model(theirs, ours)
    assert (found is None) == (wrong is None), found
    assert wrong is None or wrong in str(found)


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """What the log has said of instances."""
    caplog.set_level(logging.INFO)
    loggers = ("ares.gateway.pool.instance", "ares.gateway.pool.pool")
    return lambda: [line.getMessage() for line in caplog.records if line.name in loggers]


@pytest.fixture
async def stranger() -> AsyncIterator[str]:
    """The URL of a server that has no such route, as a plain vLLM."""
    runner = web.AppRunner(web.Application(), access_log=None)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield f"http://127.0.0.1:{port}"
    await runner.cleanup()


async def test_every_address_that_leads_nowhere_is_logged_once(lines: Lines, stranger: str, model_folder: Path) -> None:
    closed, unknown = f"http://127.0.0.1:{free_port()}", "http://no-such-host.invalid:8100"
    async with serving([], model_folder, tuning=IMPATIENT, workers=[closed, unknown, stranger]) as service:
        await eventually(lambda: len(lines()) >= 3, 15)
        await asyncio.sleep(0.5)
        found = {line.split(" ")[0]: line for line in lines()}
        assert len(lines()) == 3
        assert "cannot be reached: connection refused" in found[closed]
        assert "cannot be reached: " in found[unknown]
        assert "404; start it with `ares worker`" in found[stranger]
        message = (await service.client.get("/ready")).json()["error"]["message"]
        rows = (await service.client.get("/admin/v1/status")).json()["instances"]
        for url in (closed, unknown, stranger):
            why = next(row["why"] for row in rows if row["url"] == url)
            assert f"{url} {why}" == found[url]
            assert why in message


async def test_an_instance_whose_server_fails_is_not_taken_for_another_program(
    lines: Lines, model_folder: Path
) -> None:
    async def fail(_: web.Request) -> web.Response:
        raise web.HTTPBadGateway

    application = web.Application()
    application.router.add_get("/ares/v1/instance", fail)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    url = f"http://127.0.0.1:{free_port()}"
    await web.TCPSite(runner, "127.0.0.1", int(url.rpartition(":")[2])).start()
    async with serving([], model_folder, tuning=IMPATIENT, workers=[url]):
        await eventually(lambda: bool(lines()), 15)
        assert "cannot be reached: it answers GET /ares/v1/instance with 502; see its log" in lines()[0]
    await runner.cleanup()


async def test_many_reasons_are_named_in_part(lines: Lines, model_folder: Path) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(9)]
    async with serving([], model_folder, tuning=IMPATIENT, workers=urls) as service:
        # Of these instances: what other gateways of this process have to say is theirs.
        await eventually(lambda: {line.split(" ")[0] for line in lines()} >= {*urls}, 15)
        message = (await service.client.get("/ready")).json()["error"]["message"]
        assert message.count("connection refused") == 5
        assert message.endswith("; and 4 more")


async def test_a_worker_of_another_model_is_not_used(
    lines: Lines, fakes: list[FakeInstance], model_folder: Path
) -> None:
    for fake in fakes:
        fake.models = [MODEL]
    fakes[2].models = ["other-model"]
    async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: service.gateway.pool.ready and "other-model" in " ".join(lines()), 15)
        assert [(await service.complete()).status_code for _ in range(6)] == [200] * 6
        assert fakes[2].asked == []
        rows = (await service.client.get("/admin/v1/status")).json()["instances"]
        why = next(row["why"] for row in rows if row["url"] == fakes[2].url)
        assert why.startswith(f"is not used: it serves another model: other-model instead of {MODEL}; ")
        assert f"--served-model-name {MODEL}" in why
        assert lines().count(f"{fakes[2].url} {why}") == 1
        await service.client.post("/admin/v1/instances/decode-0/drain", json={"force": True})
        assert why in (await service.client.get("/ready")).json()["error"]["message"]
        # Started again with the right one, it is used.
        await fakes[2].die()
        fakes[2].models = ["alias", MODEL]
        await fakes[2].start()
        await eventually(lambda: service.gateway.pool.ready, 15)
        assert (await service.complete()).status_code == 200
        assert fakes[2].asked


async def test_one_that_does_not_say_its_model_is_used_with_a_warning(
    lines: Lines, fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances), 15)
        await fakes[1].die()
        await fakes[1].start()
        await eventually(lambda: "decode-0" in " ".join(lines()[-1:]) and "again" in lines()[-1], 15)
        warned = [line for line in lines() if "does not report which model it serves" in line]
        assert sorted(line.split(" ")[0] for line in warned) == ["decode-0", "decode-1", "prefill-0"]


@pytest.mark.parametrize(
    ("theirs", "ours", "cause"),
    [
        (KEY, None, "asks for a control key and this gateway has none"),
        (KEY, OTHER_KEY, "has another control key than this gateway, or none"),
        (None, KEY, "has another control key than this gateway, or none"),
    ],
)
async def test_a_control_key_that_is_missing_or_wrong(
    lines: Lines, model_folder: Path, theirs: str | None, ours: str | None, cause: str
) -> None:
    async with instances("both", vocabulary=VOCABULARY) as fakes:
        await fakes[0].die()
        fakes[0].control_key = theirs
        await fakes[0].start()
        settings: dict[str, Any] = {"control_key": ours} if ours is not None else {}
        async with serving(fakes, model_folder, tuning=IMPATIENT, **settings) as service:
            await eventually(lambda: "control channel" in " ".join(lines()), 15)
            (line,) = (line for line in lines() if "control channel" in line)
            assert line.startswith(f"both-0 ({fakes[0].url}) sends nothing on its control channel: ")
            assert f"{fakes[0].control_address} {cause}" in line
            assert "--control-key-file" in line
            assert cause in (await service.client.get("/ready")).json()["error"]["message"]


async def test_a_control_channel_that_cannot_be_reached(lines: Lines, model_folder: Path) -> None:
    async with instances("both", vocabulary=VOCABULARY) as fakes:
        fakes[0].control_address = f"tcp://127.0.0.1:{free_port()}"
        async with serving(fakes, model_folder, tuning=IMPATIENT):
            await eventually(lambda: "cannot be reached; open that port" in " ".join(lines()), 15)


async def test_death_return_and_drain_are_a_line_each(
    lines: Lines, fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances), 15)
        who = f"decode-0 ({fakes[1].url})"

        def mine() -> list[str]:
            return [line.removeprefix(f"{who} ") for line in lines() if line.startswith(who)][1:]

        assert [line for line in lines() if line == f"{who} is ready"]
        seen = len(mine())
        await fakes[1].die()
        await eventually(lambda: len(mine()) > seen, 15)
        await asyncio.sleep(0.3)
        await fakes[1].start()
        await eventually(lambda: "is ready again" in mine(), 15)
        service.gateway.pool.find("decode-0")
        await service.client.post("/admin/v1/instances/decode-0/drain", json={})
        await eventually(lambda: "is draining and takes no new requests" in mine(), 15)
        rows = (await service.client.get("/admin/v1/status")).json()["instances"]
        assert {row["name"]: row["why"] for row in rows} == {
            "prefill-0": None,
            "decode-0": "is draining and takes no new requests",
            "decode-1": None,
        }
        await service.client.post("/admin/v1/instances/decode-0/undrain")
        await eventually(lambda: mine()[-1] == "is ready again", 15)
        lost, back, drains, again = mine()[seen:]
        assert lost == "is lost: connection refused"
        assert (back, drains, again) == ("is ready again", "is draining and takes no new requests", "is ready again")
