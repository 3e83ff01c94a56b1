"""`file:PATH`: a YAML file of instances, read again when it has changed; also in the form of llm-d's endpoints file.

The forms are `instances:` with URLs, and `endpoints:` with a `name`, an `address` and a `port` each, as llm-d's
endpoint picker reads it (llm-d-router, pkg/epp/framework/plugins/datalayer/discovery/file).
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ares.gateway.discovery.base import SourceError, checked
from ares.gateway.tuning import DEFAULT, Tuning
from ares.instance_sources import http_url
from ares.yaml_text import MALFORMED, YamlError, parse

# As llm-d's limit.
_MAXIMUM_BYTES = 1 << 20
# YAML's aliases make a large document of a small file.
_MAXIMUM_SHOWN = 60
_FIELDS = {"name", "namespace", "address", "port", "labels", "metricsHost"}


class FileSource:
    """A watched file.

    It is looked at once a period rather than by a notification, which neither network file systems nor the exchanged
    links of a mounted ConfigMap give. It is read when it has not changed for one period: it may be half-written.

    Parameters
    ----------
    name
        The setting.
    path
        The file.
    tuning
        The gateway's times and limits.
    """

    def __init__(self, name: str, path: Path, tuning: Tuning = DEFAULT) -> None:
        self.name = name
        self._path = path
        self._period_s = tuning.file_period_s
        # The file at the last look; none before the first, when there may be nobody who writes it.
        self._seen: tuple[int, ...] | None = None

    async def states(self) -> AsyncGenerator[list[str]]:
        """Yield the URLs whenever the file has changed (see `Source`)."""
        read: tuple[int, ...] | None = None
        while True:
            version = await asyncio.to_thread(self._version)
            if version is None:
                raise SourceError(f"{self._path}: no such file")
            unchanged, self._seen = self._seen in (version, None), version
            if unchanged and version != read:
                yield await asyncio.to_thread(read_urls, self._path)
                read = version
            await asyncio.sleep(self._period_s)

    def _version(self) -> tuple[int, ...] | None:
        """Return what changes with the file; None where there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_urls(path: Path) -> list[str]:
    """Return the URLs of a file in either form; SourceError says what is wrong with it."""
    try:
        # A pipe or a device would block, or never end.
        with open(path, "rb", opener=_without_waiting) as file:
            data = file.read(_MAXIMUM_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from None
    if len(data) > _MAXIMUM_BYTES:
        raise SourceError(f"{path}: it is larger than {_MAXIMUM_BYTES >> 20} MiB")
    try:
        return checked(urls(parse(data)))
    except (SourceError, YamlError) as error:
        raise SourceError(f"{path}: {error}") from None
    except MALFORMED as error:
        raise SourceError(f"{path}: {_first_line(error)}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"it is no YAML: {problem}" + (f", line {mark.line + 1}" if mark is not None else "")


def urls(document: Any) -> list[str]:
    """Return the URLs of a document in either form; SourceError says what is wrong with it."""
    if not isinstance(document, dict):
        found = "nothing" if document is None else f"a {type(document).__name__}"
        raise SourceError(f"expected `instances:` or `endpoints:`, found {found}; for no instance, write instances: []")
    if len(document) != 1 or not {"instances", "endpoints"} & document.keys():
        keys = ", ".join(_shown(key) for key in list(document)[:5])
        raise SourceError(f"expected either `instances:` or `endpoints:`, found {keys or 'neither'}")
    [(key, entries)] = document.items()
    if not isinstance(entries, list):
        raise SourceError(f"{key}: expected a list, found {_shown(entries)}")
    return _of_instances(entries) if key == "instances" else _of_endpoints(entries)


def _of_instances(entries: list[Any]) -> list[str]:
    """Read our own form: URLs, or mappings with `url`."""
    found = []
    for entry in entries:
        url = entry.get("url") if isinstance(entry, dict) and entry.keys() == {"url"} else entry
        if not isinstance(url, str):
            raise SourceError(f"instances: expected a URL such as http://10.0.0.1:8100, found {_shown(entry)}")
        found.append(url)
    return found


def _of_endpoints(entries: list[Any]) -> list[str]:
    """Read llm-d's form."""
    found: dict[tuple[str, str], str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not {"name", "address", "port"} <= entry.keys():
            raise SourceError(f"endpoints: expected name, address and port, found {_shown(entry)}")
        if unknown := entry.keys() - _FIELDS:
            raise SourceError(
                f"endpoints: {_shown(entry['name'])} has an unknown field {_shown(min(map(str, unknown)))}"
            )
        name, address, port = str(entry["name"]), entry["address"], str(entry["port"])
        if not isinstance(address, str) or not address or set(address) & set("/@[] "):
            raise SourceError(f"endpoints: {_shown(name)} has no address, but {_shown(address)}")
        if not port.isdecimal() or not 0 < int(port[:6]) < 1 << 16:
            raise SourceError(f"endpoints: {_shown(name)} has no port, but {_shown(port)}")
        key = str(entry.get("namespace", "default")), name
        url = http_url(address, port)
        if found.setdefault(key, url) != url:
            raise SourceError(f"endpoints: {_shown(name)} stands there twice, with different addresses")
    return list(found.values())


def _shown(value: Any) -> str:
    """Return a value as an error shows it: scalars shortened, collections by their kind."""
    if isinstance(value, dict | list | set | tuple):
        return f"a {type(value).__name__}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 63 else "a large number"
    return text if len(text) <= _MAXIMUM_SHOWN else text[:_MAXIMUM_SHOWN] + "..."
