"""Which instances there are: the union of what all sources name, carried over into the pool."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ares.gateway.discovery.base import MAXIMUM_INSTANCES, Source, SourceError
from ares.gateway.discovery.dns import AddressSource, SrvSource
from ares.gateway.discovery.file import FileSource
from ares.gateway.discovery.kubernetes import EndpointSlices, KubernetesSource, Pods
from ares.gateway.discovery.ray import RaySource
from ares.gateway.tuning import DEFAULT, Tuning
from ares.instance_sources import SourceSetting, canonical, check_url, parse_source

logger = logging.getLogger(__name__)

GIVEN = "--worker"
API = "the API"


def make_sources(settings: Iterable[str], tuning: Tuning = DEFAULT) -> list[Source]:
    """Return the sources of settings that `instance_sources.parse_source` takes."""
    parsed = (parse_source(text) for text in settings)
    return [_source(one, tuning) for one in parsed if one.kind != "api"]


def _source(setting: SourceSetting, tuning: Tuning) -> Source:
    text, parts = setting.text, setting.parts
    if setting.kind == "file":
        return FileSource(text, Path(parts["path"]).expanduser(), tuning)
    if setting.kind == "dns":
        return AddressSource(text, parts["host"], int(parts["port"]), tuning)
    if setting.kind == "srv":
        return SrvSource(text, parts["name"], tuning)
    if setting.kind == "ray":
        return RaySource(text, parts["application"], tuning)
    if setting.kind == "kubernetes":
        objects = EndpointSlices(parts["service"], parts.get("port"))
        return KubernetesSource(text, parts["namespace"], objects, tuning)
    return KubernetesSource(text, parts["namespace"], Pods(parts["labels"], int(parts["port"])), tuning)


class Watching(Protocol):
    """Watches instances: one pool, or those of several models."""

    def add(self, url: str, why: str) -> object:
        """Watch an instance from now on."""

    def remove(self, url: str, why: str, deadline_s: float) -> None:
        """Let an instance go."""


class NamedElsewhereError(Exception):
    """An instance cannot be removed: a source that is watched names it."""


class Membership:
    """Which instances there are.

    An instance is in the pool as long as something names its URL: `--worker`, the API, or a source. What a source has
    named stays in force while the source cannot tell.

    Parameters
    ----------
    pool
        Gets what is named.
    given
        URLs that are named from the start.
    sources
        Name further ones.
    tuning
        The gateway's times and limits.
    """

    def __init__(
        self, pool: Watching, given: Iterable[str], sources: Sequence[Source], tuning: Tuning = DEFAULT
    ) -> None:
        self._pool = pool
        self._sources = sources
        self._tuning = tuning
        # By what names them: URLs by their canonical form.
        self._named: dict[str, dict[str, str]] = {GIVEN: _by_form(given), API: {}}
        self._problems: dict[str, str] = {}

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong with each source that cannot tell at present."""
        return dict(self._problems)

    def named_by(self, url: str) -> list[str]:
        """Return what names a URL."""
        form = canonical(url)
        return [name for name, urls in self._named.items() if form in urls]

    async def run(self) -> None:
        """Follow all sources until cancelled."""
        await asyncio.gather(*(self._follow(source) for source in self._sources))

    # --- by the API ---

    def add(self, url: str) -> bool:
        """Add an instance by the API; return whether nothing named it before.

        Raises
        ------
        ValueError
            The URL is wrong, or there are too many.
        """
        url = check_url(url)
        new = not self.named_by(url)
        ours = self._named[API]
        if canonical(url) not in ours and len(ours) >= MAXIMUM_INSTANCES:
            raise ValueError(f"there are {len(ours)} instances already that the API has added")
        self._set(API, {**ours, canonical(url): url}, "")
        return new

    def remove(self, url: str, deadline_s: float) -> None:
        """Remove an instance that the API or `--worker` has named.

        Raises
        ------
        NamedElsewhereError
            A source names it, too.
        """
        form = canonical(url)
        watched = [name for name in self.named_by(url) if name not in (API, GIVEN)]
        if watched:
            raise NamedElsewhereError(f"{' and '.join(watched)} names it: remove it there, or drain it")
        for name in (API, GIVEN):
            rest = {other: kept for other, kept in self._named[name].items() if other != form}
            self._set(name, rest, "it was removed by the API", deadline_s)

    @property
    def given(self) -> dict[str, list[str]]:
        """The URLs that `--worker` and the API name at present, for `take_over`."""
        return {name: list(self._named[name].values()) for name in (GIVEN, API)}

    def take_over(self, given: Mapping[str, Iterable[str]]) -> None:
        """Name what another process of the gateway names, and not what was removed there."""
        for name in (GIVEN, API):
            self._set(name, _by_form(given[name]), "it was removed by the API", 0.0)

    # --- by the sources ---

    async def _follow(self, source: Source) -> None:
        while True:
            try:
                async with contextlib.aclosing(source.states()) as states:
                    async for urls in states:
                        self._solved(source.name)
                        self._set(source.name, _by_form(urls), f"{source.name} does not name it any more")
            except SourceError as error:
                self._complain(source.name, str(error))
            except Exception as error:  # only this source fails, not the service (I7)
                logger.exception("%s failed", source.name)
                self._complain(source.name, f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._tuning.source_retry_s)

    def _complain(self, name: str, why: str) -> None:
        if self._problems.get(name) != why:
            self._problems[name] = why
            known = len(self._named.get(name, ()))
            text = "%s: %s; the %d instances that it named last stay"
            logger.warning(text, name, why, known, extra={"source": name, "why": why})

    def _solved(self, name: str) -> None:
        if self._problems.pop(name, None) is not None:
            logger.info("%s: it can be read again", name, extra={"source": name})

    def _set(self, name: str, urls: dict[str, str], why_gone: str, deadline_s: float | None = None) -> None:
        """Replace what `name` names, and let the pool follow."""
        before = self._named.get(name, {})
        self._named[name] = urls
        for form, url in urls.items():
            if form not in before:
                self._pool.add(url, f"{name} names it")
        named = {form for of_one in self._named.values() for form in of_one}
        for form, url in before.items():
            if form not in named:
                self._pool.remove(url, why_gone, self._tuning.leave_s if deadline_s is None else deadline_s)


def _by_form(urls: Iterable[str]) -> dict[str, str]:
    return {canonical(url): url for url in urls}
