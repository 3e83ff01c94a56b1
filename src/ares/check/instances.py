"""The instances of a cluster: whether each answers, serves the model, and can be commanded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import msgspec

from ares.check.rows import Outcome, Row
from ares.gateway.pool.discovery import Served, Unusable, another_model, describe
from ares.gateway.pool.generate import http_client, whole_body
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool, why_closed
from ares.protocol import messages
from ares.protocol.keys import ControlKey

GROUP = "instances"
# An instance that is alive reports within this long.
_REPORT_S = 10.0
_POLL_S = 0.05
_VERSION_TIMEOUT_S = 5.0
_MAXIMUM_VERSION_BYTES = 1 << 16
_TELEMETRY_INTERVAL_S = 0.1


class _Version(msgspec.Struct):
    """The reply to vLLM's `GET /version`, and the part of it that a mock engine adds."""

    version: str = ""
    mock: bool = False


@dataclass(slots=True)
class Found:
    """An instance that can be checked.

    Attributes
    ----------
    vllm
        The version that its server reports (`GET /version`); empty where it does not.
    mock
        Whether it is a mock engine.
    """

    instance: Instance
    description: messages.Description
    hello: messages.Hello
    vllm: str = ""
    mock: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return self.instance.name


@dataclass(slots=True)
class Cluster:
    """The instances that can be checked, and how they are reached.

    Attributes
    ----------
    gateway
        The name that the instances know this process by.
    served
        The model; None where no instance answers and none was given.
    """

    gateway: str
    http: aiohttp.ClientSession
    pool: Pool
    served: Served | None
    found: list[Found] = field(default_factory=list)

    @property
    def prefill(self) -> list[Found]:
        """Those that only prefill."""
        return [each for each in self.found if each.hello.role == "prefill"]

    @property
    def decode(self) -> list[Found]:
        """Those that decode."""
        return [each for each in self.found if each.hello.role != "prefill"]


@contextlib.asynccontextmanager
async def connected(
    urls: list[str], served: Served | None, control_key: ControlKey | None, api_key: str | None, gateway: str
) -> AsyncIterator[tuple[Cluster, list[Row]]]:
    """Yield the instances at these URLs, and a row for each.

    Parameters
    ----------
    served
        The model that they must serve; None takes that of the first one that answers.
    control_key, api_key
        Of their control channels, and of their HTTP servers.
    gateway
        A name for this process, one that no gateway has.
    """
    async with http_client(api_key) as http:
        described = dict(zip(urls, await asyncio.gather(*(describe(http, url) for url in urls)), strict=True))
        answering = {url: each for url, each in described.items() if isinstance(each, messages.Description)}
        served = served or _served_by(answering)
        others = {url: why for url, each in answering.items() if served and (why := another_model(each, served))}
        usable = {url: each for url, each in answering.items() if url not in others}
        pool = Pool(list(usable), http, _TELEMETRY_INTERVAL_S, control_key, gateway)
        pool.start()
        try:
            cluster = Cluster(gateway, http, pool, served)
            await _until_reported(pool)
            cluster.found = [await _found(http, each, usable[each.url]) for each in pool.instances if _reports(each)]
            yield cluster, [_row(url, described[url], others, cluster) for url in urls]
        finally:
            await pool.stop()


def _served_by(answering: dict[str, messages.Description]) -> Served | None:
    for each in answering.values():
        if each.models:
            return Served(tuple(each.models), each.shape)
    return None


async def _until_reported(pool: Pool) -> None:
    """Wait until every instance can be used, or for so long that one that is alive would be."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _REPORT_S
    while loop.time() < deadline and not all(map(_reports, pool.instances)):
        # Its first report changes no status.
        await pool.wait_for_change(_POLL_S)


def _reports(instance: Instance) -> bool:
    state = instance.state
    return instance.open and state.hello is not None and state.telemetry is not None


async def _found(http: aiohttp.ClientSession, instance: Instance, description: messages.Description) -> Found:
    version = _Version()
    with contextlib.suppress(aiohttp.ClientError, OSError, ValueError, msgspec.DecodeError):
        timeout = aiohttp.ClientTimeout(total=_VERSION_TIMEOUT_S)
        async with http.get(f"{instance.url}/version", timeout=timeout) as reply:
            version = msgspec.json.decode(await whole_body(reply, _MAXIMUM_VERSION_BYTES), type=_Version)
    assert instance.state.hello is not None  # noqa: S101 - for the type checker: the caller has checked
    return Found(instance, description, instance.state.hello, version.version, version.mock)


def _row(url: str, described: messages.Description | Unusable, others: dict[str, str], cluster: Cluster) -> Row:
    if isinstance(described, Unusable):
        cause, _, advice = described.cause.partition("; ")
        return Row(GROUP, url, Outcome.FAIL, f"{described.status.value.text}: {cause}", advice)
    name = f"{described.name} ({url})"
    if (why := others.get(url)) is not None:
        cause, _, advice = why.partition("; ")
        return Row(
            GROUP, name, Outcome.FAIL, f"serves another model: {cause}", advice or "give all instances the same --model"
        )
    if any(each.instance.url == url.rstrip("/") for each in cluster.found):
        return Row(GROUP, name, Outcome.PASS, f"{described.role}, reports over its control channel")
    instance = next((each for each in cluster.pool.instances if each.url == url.rstrip("/")), None)
    if instance is None:
        return Row(GROUP, name, Outcome.WARN, "was given twice", "leave one of the two --worker out")
    if instance.state.draining:
        return Row(GROUP, name, Outcome.FAIL, "drains", "ares undrain, or start it again")
    cause, _, advice = (why_closed(instance) or "reports nothing").partition("; ")
    if "control-key" not in cause + advice:
        # Which end notices first that the keys differ is left to chance, and so is the cause.
        advice = "; ".join(filter(None, [advice, "compare the control keys (--control-key-file)"]))
    return Row(GROUP, name, Outcome.FAIL, cause, advice)
