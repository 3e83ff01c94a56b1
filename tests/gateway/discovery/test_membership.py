"""What sources name, carried over into a pool: whatever they say, the last good state stays."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from ares.gateway.discovery.base import SourceError
from ares.gateway.discovery.dns import AddressSource, SrvSource
from ares.gateway.discovery.file import FileSource
from ares.gateway.discovery.kubernetes import KubernetesSource
from ares.gateway.discovery.membership import Membership, NamedElsewhereError, make_sources
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.pool import Pool
from ares.gateway.tuning import Tuning
from tests.gateway.fakes import FakeInstance, expected, instances
from tests.gateway.http.service import PROMPT, serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

QUICK = Tuning(source_retry_s=0.01, file_period_s=0.01, reconnect_s=0.02, drain_period_s=0.02)


class Said:
    """A source that says what a test lets it say."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._next: asyncio.Queue[list[str] | Exception] = asyncio.Queue()

    def say(self, *said: list[str] | Exception) -> None:
        for one in said:
            self._next.put_nowait(one)

    async def states(self) -> AsyncGenerator[list[str]]:
        while True:
            said = await self._next.get()
            if isinstance(said, Exception):
                raise said
            yield said


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    """A pool that is not started: it is told, and reaches nobody."""
    http = http_client()
    yield Pool(["http://given:1"], http, 0.1, tuning=QUICK)
    await http.close()


def named(pool: Pool) -> list[str]:
    return sorted(i.url for i in pool.instances if not i.leaving)


async def test_an_instance_stays_as_long_as_anything_names_it(pool: Pool) -> None:
    first, second = Said("file:a"), Said("dns:b:1")
    membership = Membership(pool, ["http://given:1"], [first, second], QUICK)
    task = asyncio.create_task(membership.run())
    first.say(["http://a:1", "http://b:80"])
    second.say(["http://b/", "http://given:1"])
    await eventually(lambda: named(pool) == ["http://a:1", "http://b:80", "http://given:1"])
    await eventually(lambda: membership.named_by("http://B") == ["file:a", "dns:b:1"])
    first.say([])
    await eventually(lambda: named(pool) == ["http://b:80", "http://given:1"])
    assert [i.why_leaving for i in pool.leaving] == ["file:a does not name it any more"]
    second.say([], ["http://a:1"])
    await eventually(lambda: named(pool) == ["http://a:1", "http://given:1"])
    task.cancel()


async def test_a_source_that_cannot_tell_changes_nothing(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ares.gateway.discovery")
    source = Said("file:a")
    membership = Membership(pool, [], [source], QUICK)
    task = asyncio.create_task(membership.run())
    source.say(["http://a:1"], *[SourceError("it is no YAML")] * 3, KeyError("a mistake of ours"))
    await eventually(lambda: "KeyError" in membership.problems.get("file:a", ""))
    assert "http://a:1" in named(pool)
    source.say(["http://a:1"])
    await eventually(lambda: not membership.problems)
    task.cancel()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "file:a: it is no YAML; the 1 instances that it named last stay",
        "file:a failed",
        "file:a: KeyError: 'a mistake of ours'; the 1 instances that it named last stay",
        "file:a: it can be read again",
    ]


async def test_by_hand_only_what_no_source_names_is_removed(pool: Pool) -> None:
    source = Said("file:a")
    membership = Membership(pool, ["http://given:1"], [source], QUICK)
    task = asyncio.create_task(membership.run())
    source.say(["http://a:1"])
    await eventually(lambda: len(named(pool)) == 2)
    with pytest.raises(NamedElsewhereError, match="file:a names it: remove it there, or drain it"):
        membership.remove("http://a:1", 1.0)
    assert not membership.add("http://a:1/")
    assert membership.add("http://b:1")
    membership.remove("http://given:1", 1.0)
    membership.remove("http://b:1", 1.0)
    assert named(pool) == ["http://a:1"]
    with pytest.raises(ValueError, match="is not the URL"):
        membership.add("nonsense")
    task.cancel()


async def test_a_gateway_that_finds_nobody_says_why(model_folder: Path, tmp_path: Path) -> None:
    source = f"file:{tmp_path / 'none.yaml'}"
    async with serving([], model_folder, QUICK, service_discovery=[source, "api"]) as service:
        await eventually(lambda: bool(service.gateway.membership.problems))
        said = (await service.client.get("/ready")).json()["error"]["message"]
        known = f"{source} ({tmp_path / 'none.yaml'}: no such file), api"
        assert said == f"no decode instance is ready: no instance is known; waiting for one from {known}"


def test_each_kind_of_source_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    settings = ["file:a", "dns:b:1", "srv:c", "kubernetes:d/e", "pods:d/f=g:1", "api"]
    made = make_sources(settings)
    assert [type(one) for one in made] == [FileSource, AddressSource, SrvSource, KubernetesSource, KubernetesSource]
    assert [one.name for one in made] == settings[:-1]


async def test_instances_of_a_file_come_and_go_under_load(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "instances.yaml"

    def write(*fakes: FakeInstance) -> None:
        new = path.with_suffix(".new")
        new.write_text("instances:\n" + "".join(f"- {fake.url}\n" for fake in fakes))
        new.replace(path)

    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        prefill, first, second = fakes
        write(prefill, first)
        async with serving([], model_folder, QUICK, service_discovery=[f"file:{path}"]) as service:
            await eventually(lambda: service.gateway.pool.ready)
            for fake in fakes:
                fake.hold_at = 20
            streams = [asyncio.create_task(service.complete(max_tokens=80)) for _ in range(4)]
            await eventually(lambda: len(first.running) == 4)
            write(prefill, second)
            await eventually(lambda: any(i.url == second.url and i.open for i in service.gateway.pool.instances))
            for fake in fakes:
                fake.hold_at = None
            for stream in streams:
                tokens = (await stream).json()["choices"][0]["token_ids"]
                assert tokens == expected(PROMPT, 80, vocabulary=VOCABULARY)
            await eventually(
                lambda: sorted(i.name for i in service.gateway.pool.instances) == ["decode-1", "prefill-0"]
            )
            path.write_text("instances: [half")
            route = "/admin/v1/instances"
            await eventually(lambda: bool(service.gateway.membership.problems))
            [source] = (await service.client.get(route)).json()["sources"]
            assert "it is no YAML" in source["problem"]
            assert (await service.complete()).status_code == 200
            assert len([record for record in caplog.records if "it is no YAML" in record.getMessage()]) == 1
