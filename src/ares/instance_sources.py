"""Where instances are: their URLs, and the sources that name them (`--service-discovery KIND:WHERE`), checked."""

import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from ares import extras

# By kind: how `WHERE` is written, and the package that the source needs.
_NAME = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_FORMS: dict[str, tuple[str, str, str | None]] = {
    "file": ("PATH", r"(?P<path>.+)", None),
    "dns": ("HOST:PORT", r"(?P<host>[^\s:/@]+):(?P<port>\d{1,5})", None),
    "srv": ("NAME", r"(?P<name>[^\s:/@]+)", "dns"),
    "kubernetes": (
        "NAMESPACE/SERVICE[:PORT]",
        rf"(?P<namespace>{_NAME})/(?P<service>{_NAME})(:(?P<port>[-a-z0-9]+))?",
        "kubernetes",
    ),
    "pods": (
        "NAMESPACE/LABEL=VALUE,...:PORT",
        rf"(?P<namespace>{_NAME})/(?P<labels>[^\s:]*=[^\s:]*):(?P<port>\d{{1,5}})",
        "kubernetes",
    ),
    "ray": ("APPLICATION", r"(?P<application>[^\s:/@]+)", "ray"),
    "api": ("", r"", None),
}


@dataclass(frozen=True, slots=True)
class SourceSetting:
    """One `--service-discovery`.

    Attributes
    ----------
    text
        As it was given.
    kind
        What kind of source it is.
    parts
        What its form names, such as `host` and `port`.
    """

    text: str
    kind: str
    parts: Mapping[str, str]


def parse_source(text: str) -> SourceSetting:
    """Return what a setting `KIND:WHERE` says; ValueError says what is wrong with it."""
    kind, _, where = text.strip().partition(":")
    if kind not in _FORMS:
        raise ValueError(f"{text!r}: no source {kind!r}; known: {', '.join(_written(known) for known in _FORMS)}")
    _, pattern, package = _FORMS[kind]
    found = re.fullmatch(pattern, where)
    if found is None:
        raise ValueError(f"{text!r}: expected {_written(kind)}")
    parts = {name: value for name, value in found.groupdict().items() if value is not None}
    port = parts.get("port", "")
    if port.isdecimal() and not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r}: {port} is no port")
    if package is not None:
        try:
            extras.require(package)
        except extras.MissingPackageError as error:
            raise ValueError(f"{text!r}: {error}") from None
    return SourceSetting(text.strip(), kind, parts)


def _written(kind: str) -> str:
    form = _FORMS[kind][0]
    return f"{kind}:{form}" if form else kind


def check_url(url: str) -> str:
    """Return the base URL of an instance, without spaces around it; ValueError says what is wrong with it."""
    url = url.strip()
    if not url.isprintable():
        raise ValueError("the URL of an instance has a character that cannot be printed")
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # a host such as "[", or a port that is no number or out of range
        raise ValueError(f"{url!r} is not the URL of an instance, such as http://127.0.0.1:8100 ({error})") from None
    if "@" in parts.netloc:
        raise ValueError(
            f"the URL of the instance at {parts.hostname} has a user name or password, which is not sent: give "
            "the instances' key with --worker-api-key-file"
        )
    if not sound or " " in url:
        raise ValueError(f"{url!r} is not the URL of an instance, such as http://127.0.0.1:8100")
    if parts.path.rstrip("/").endswith("/v1") or parts.query or parts.fragment:
        raise ValueError(f"{url!r}: give the URL of the instance itself, such as http://127.0.0.1:8100")
    return url


def canonical(url: str) -> str:
    """Return the one spelling of a URL that `check_url` takes: without a default port or a slash at its end."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}.get(parts.scheme)
    port = "" if parts.port in (None, default) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def http_url(host: str, port: int | str) -> str:
    """Return the URL of a host, which may be an IPv6 address, and a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
