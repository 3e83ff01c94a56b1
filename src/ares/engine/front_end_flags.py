"""Flags of vLLM's front end (`vllm serve`, 0.32): which act on the gateway, which on the instances, which are refused.

An instance's own front end answers the gateway alone, with token ids: a flag for clients of its `/v1` routes would have
no effect. So each of these flags has its place in `FLAGS`; all others are the engine's, and go to the instances.
"""

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NoReturn

from ares.engine.given_flags import each


class Place(Enum):
    """Where a flag acts."""

    GATEWAY = auto()
    """On the gateway: `ares gateway` has it, and `ares up` hands it on."""
    BOTH = auto()
    """On gateway and instances: `ares up` gives it to all of them."""
    INSTANCE = auto()
    """On the instances."""
    SERVER = auto()
    """On the HTTP server of one instance: `ares worker` has it, and `ares up` has no use for it."""
    COMMAND = auto()
    """It is an option of the `ares` commands themselves, or they set it."""
    NOWHERE = auto()
    """It would have no effect, or a wrong one: it is refused."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag's place, and what to do instead where it is refused."""

    place: Place
    instead: str = ""


_KEY = "set VLLM_API_KEY for the instances, and give the gateway keys of clients (docs/security.md)"
_TLS = "for the endpoint set ARES_TLS_CERTIFICATE and ARES_TLS_KEY (docs/security.md)"
_HEADS = "the gateway's own limit is max_head_bytes (docs/operations.md)"
_REVISION = "fetch that revision to a folder, and give the folder"
_LAYERS = "put it on a proxy in front of the gateway, or give it to `ares worker` for an instance"
_RANKS = "it is of one engine with several ranks behind one port; start one `ares worker` for each rank"
_MEDIA = "the instances are given text alone"
_METRICS = "GET /metrics and /admin/v1/status of the gateway have it"
_OTHER_API = "the gateway has no such route"
_FINGERPRINT = "replies have no system_fingerprint; GET /version has the versions"

_PLACES: dict[Place, tuple[str, ...]] = {
    Place.GATEWAY: (
        "allow-credentials",
        "allowed-headers",
        "allowed-methods",
        "allowed-origins",
        "chat-template",
        "chat-template-content-format",
        "default-chat-template-kwargs",
        "disable-fastapi-docs",
        "enable-auto-tool-choice",
        "enable-force-include-usage",
        "enable-prompt-tokens-details",
        "exclude-tools-when-tool-choice-none",
        "response-role",
        "return-tokens-as-token-ids",
        "sse-keep-alive-interval",
        "tool-call-parser",
        "tool-parser-plugin",
        "tool-strict-level",
        "trust-request-chat-template",
    ),
    Place.BOTH: (
        "generation-config",
        "max-logprobs",
        "override-generation-config",
        "reasoning-parser",
        "reasoning-parser-plugin",
        "served-model-name",
        "tokenizer",
    ),
    Place.INSTANCE: (
        "disable-access-log-for-endpoints",
        "disable-uvicorn-access-log",
        "enable-log-deltas",
        "enable-log-outputs",
        "enable-log-requests",
        "enable-server-load-tracking",
        "log-error-stack",
        "logprobs-mode",
        "lora-modules",
        "max-log-len",
        "shutdown-timeout",
        "uvicorn-log-level",
    ),
    Place.COMMAND: ("api-server-count", "config", "enable-scale-out", "grpc", "headless", "host", "model", "port"),
}
_SERVER = {
    "api-key": _KEY,
    "enable-ssl-refresh": _TLS,
    "h11-max-header-count": _HEADS,
    "h11-max-incomplete-event-size": _HEADS,
    "middleware": _LAYERS,
    "ssl-ca-certs": _TLS,
    "ssl-cert-reqs": _TLS,
    "ssl-certfile": _TLS,
    "ssl-ciphers": _TLS,
    "ssl-keyfile": _TLS,
}
_NOWHERE = {
    "anthropic-disabled-thinking-effort": "the gateway finds the effort by trying the chat template; leave it out",
    "code-revision": f"{_REVISION} as --model",
    "cohere-format": "give it as a variable of the template: --default-chat-template-kwargs '{\"cohere_format\": ...}'",
    "cohere-is-reasoning-model": _OTHER_API,
    "data-parallel-supervisor-port": _RANKS,
    "dp-supervisor-probe-failure-threshold": _RANKS,
    "dp-supervisor-probe-interval-s": _RANKS,
    "dp-supervisor-probe-timeout-s": _RANKS,
    "enable-flash-late-interaction": "it is of pooling models, which are not served",
    "enable-offline-docs": "the gateway's /docs needs no other host; leave it out",
    "enable-per-request-metrics": _METRICS,
    "enable-request-id-headers": "every reply of the gateway has x-request-id; leave it out",
    "enable-tokenizer-info-endpoint": _OTHER_API,
    "fingerprint-mode": _FINGERPRINT,
    "fingerprint-value": _FINGERPRINT,
    "grpc-port": "gateways speak HTTP with an instance; leave it out",
    "revision": f"{_REVISION} as --model",
    "root-path": "let the proxy in front of the gateway take the prefix away",
    "tokenizer-mode": "the gateway has the tokenizer that transformers makes of the model's files (auto, hf)",
    "tokenizer-revision": f"{_REVISION} as --tokenizer",
    "tokens-only": "an instance needs its tokenizer, for bad_words and structured outputs; leave it out",
    "tool-server": "the gateway runs no tools; its clients do",
    "trust-request-mm-kwargs": _MEDIA,
    "uds": "gateways reach an instance by its --host and --port",
}
FLAGS: dict[str, Flag] = {
    **{name: Flag(place) for place, names in _PLACES.items() for name in names},
    **{name: Flag(Place.SERVER, instead) for name, instead in _SERVER.items()},
    **{name: Flag(Place.NOWHERE, instead) for name, instead in _NOWHERE.items()},
}
"""All flags of the front end, and those of the model that the gateway has to know, by their name without dashes."""

# The values of flags that are refused with any other one.
_HARMLESS = {"tokenizer-mode": ("auto", "hf")}
_JSON = (
    *("allowed-headers", "allowed-methods", "allowed-origins", "default-chat-template-kwargs"),
    "override-generation-config",
)
_SWITCHES = (
    *("allow-credentials", "disable-fastapi-docs", "enable-auto-tool-choice", "enable-force-include-usage"),
    *(
        "enable-prompt-tokens-details",
        "exclude-tools-when-tool-choice-none",
        "return-tokens-as-token-ids",
        "trust-request-chat-template",
    ),
)


# As vLLM reads it, also from `null` in a file.
_NONE = "None"


class FrontEndFlagError(ValueError):
    """A flag would have no effect; the message says why, and what to do."""


@dataclass(slots=True)
class GatewayFlags:
    """The flags of the gateway among others.

    Attributes
    ----------
    settings
        Settings of the gateway, by name.
    others
        All other flags, in their order.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def instance_flags(self, *, mock: bool = False) -> list[str]:
        """Return the flags that instances are to be given; mock engines have no other front end than their names."""
        shared = ("served-model-name",) if mock else _PLACES[Place.BOTH]
        return [*self.others, *self.words(shared)]

    def words(self, names: Collection[str] | None = None) -> list[str]:
        """Return the flags for these settings, or for those of these names."""
        words: list[str] = []
        for name, value in self.settings.items():
            if names is not None and name.replace("_", "-") not in names:
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            elif name == "served_model_name":
                words += [flag, *value]
            else:
                words += [flag, value if isinstance(value, str) else json.dumps(value)]
        return words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FrontEndFlagError(message)


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in (*_PLACES[Place.GATEWAY], *_PLACES[Place.BOTH]):
        flag = f"--{name}"
        if name in _SWITCHES:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif name == "served-model-name":
            parser.add_argument(flag, nargs="+", action="extend")
        else:
            parser.add_argument(flag, type=_json if name in _JSON else _text)
    return parser


def split(flags: Sequence[str]) -> GatewayFlags:
    """Take the gateway's flags out of flags of vLLM, as vLLM writes them.

    Raises
    ------
    FrontEndFlagError
        One of them has no value, or one that is no JSON.
    """
    words = _without_dots([_dashed(word) for word in flags])
    known, others = _parser().parse_known_args(words)
    return GatewayFlags({name: value for name, value in vars(known).items() if value is not None}, others)


def check(flags: Sequence[str], *, up: bool) -> None:
    """Refuse flags without an effect.

    Parameters
    ----------
    flags
        Flags of vLLM for instances, those of the gateway taken out.
    up
        Whether the instances are those of `ares up`, which no one reaches but its gateway.

    Raises
    ------
    FrontEndFlagError
        One of them has none.
    """
    for given in each(flags):
        _check(given.name, given.value, up=up, on=given.on)


def check_parsed(args: Any, defaults: Any) -> None:
    """Refuse what vLLM read for an instance from its flags, shortened ones too.

    Parameters
    ----------
    args, defaults
        vLLM's parsed arguments, and those without any flag.
    """
    for name in FLAGS:
        dest = name.replace("-", "_")
        given = getattr(args, dest, None)
        if given != getattr(defaults, dest, None):
            _check(name, str(given), up=False, on=given is not False)


def _check(name: str, value: str, *, up: bool, on: bool) -> None:
    flag = FLAGS.get(name)
    if flag is None or value in _HARMLESS.get(name, ()):
        return
    if name == "enable-scale-out" and not on:
        raise FrontEndFlagError("--no-enable-scale-out: gateways use the routes that it would close; leave it out")
    if flag.place is Place.GATEWAY:
        where = "`ares up` itself" if up else "`ares gateway`"
        raise FrontEndFlagError(f"--{name} acts on the gateway: give it to {where}; an instance is given token ids")
    if (flag.place is Place.NOWHERE and on) or (up and flag.place is Place.SERVER):
        raise FrontEndFlagError(f"--{name} would have no effect: {flag.instead}")


def _dashed(word: str) -> str:
    """Return a flag with dashes for the underscores of its name, which vLLM takes too."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    first, dot, keys = name.partition(".")
    return f"{first.replace('_', '-')}{dot}{keys}{equals}{value}"


def _without_dots(words: list[str]) -> list[str]:
    """Return flags with objects in place of vLLM's short form of them: ``--NAME.KEY VALUE``."""
    result: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    rest = iter(words)
    for word in rest:
        name, dot, keys = word.partition(".")
        if not dot or name[2:] not in _JSON:
            result.append(word)
            continue
        path, equals, value = keys.partition("=")
        *parents, last = path.split(".")
        node = objects.setdefault(name, {})
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _json_or_text(value if equals else next(rest, ""))
    return [*result, *(word for name, value in objects.items() for word in (name, json.dumps(value)))]


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text(text: str) -> str | None:
    return None if text == _NONE else text


def _json(text: str) -> Any:
    if text == _NONE:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
