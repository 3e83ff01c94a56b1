"""Instances whose published address does not lead to them are not used, and the gateway says why."""

from pathlib import Path

import pytest

from ares.gateway.pool import published
from ares.protocol import messages
from tests.gateway.fakes import instances
from tests.gateway.http.service import serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually


def described(host: str) -> messages.Description:
    return messages.Description("decode-0", "decode", "boot", f"tcp://{host}:5600")


@pytest.mark.parametrize(
    ("host", "wrong"),
    [
        ("0.0.0.0", True),  # noqa: S104 - what it is about
        ("[::]", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("[2001:db8::1]", False),
        ("a.name", False),
    ],
)
def test_every_address_is_none(host: str, wrong: bool) -> None:
    assert (published.wildcard(described(host)) is not None) == wrong


@pytest.mark.parametrize(
    ("host", "url", "wrong"),
    [
        ("127.0.0.1", "http://192.0.2.1:8100", True),
        ("localhost", "http://192.0.2.1:8100", True),
        ("[::1]", "http://[2001:db8::1]:8100", True),
        ("127.0.0.1", "http://127.0.0.1:8100", False),
        ("127.0.0.1", "http://localhost:8100", False),
        ("192.0.2.1", "http://192.0.2.1:8100", False),
        ("192.0.2.1", "http://127.0.0.1:8100", False),
        ("127.0.0.1", "http://no-such-host.invalid:8100", False),
    ],
)
async def test_loopback_is_not_published_by_another_host(host: str, url: str, wrong: bool) -> None:
    assert (await published.on_another_host(described(host), url) is not None) == wrong


async def test_an_instance_that_publishes_every_address_is_not_used(model_folder: Path) -> None:
    async with instances("both", "both", vocabulary=VOCABULARY) as fakes:
        fakes[0].control_address = "tcp://0.0.0.0:5600"
        async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
            pool = service.gateway.pool
            await eventually(lambda: [i.open for i in pool.instances] == [False, True], 15)
            await eventually(lambda: "--advertise-host" in pool.instances[0].health.why, 15)
            assert "publishes 0.0.0.0" in pool.instances[0].health.why


@pytest.mark.parametrize("first", [0, 1])
async def test_loopback_is_not_used_among_other_hosts(model_folder: Path, first: int) -> None:
    """Whichever of the two appears first: others would connect to themselves to pull from it."""
    async with instances("both", "both", vocabulary=VOCABULARY) as fakes:
        elsewhere, later = fakes[0], fakes[1 - first]
        elsewhere.control_address = "tcp://192.0.2.1:5600"
        await later.die()
        async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
            mine = service.gateway.pool.instances[1]
            if first == 1:
                await eventually(lambda: mine.open, 15)
            await later.start()
            elsewhere.control_address = "tcp://192.0.2.1:5600"  # also where it has just started
            await eventually(lambda: "publishes 127.0.0.1" in mine.health.why, 15)
            assert f"{elsewhere.name} at 192.0.2.1" in mine.health.why
            assert "--advertise-host" in mine.health.why
            assert not mine.open
            # Corrected and started again, it is used.
            await elsewhere.die()
            await elsewhere.start()
            await eventually(lambda: mine.open, 15)
