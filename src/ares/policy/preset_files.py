"""Presets as data: what the YAML file of a preset holds, and single settings given beside one. No I/O here."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ares.policy.presets import Preset
from ares.policy.rebalance import REBALANCERS
from ares.policy.settings import make_settings, parse_setting

_PARTS = ("dispatch", "admission", "queue", "suspends", "rebalance")
_DEFAULTS: dict[str, Any] = {"dispatch": "least_loaded", "admission": "open", "queue": "fcfs", "suspends": False}
_PREFIX = "rebalance."


def make_preset(data: object, defaults: Mapping[str, object]) -> Preset:
    """Make a preset of what its file holds.

    Parameters
    ----------
    data
        {dispatch, admission, queue, suspends, rebalance: {name, settings...}}; what is left out is as in
        `static-least-loaded`.
    defaults
        Settings for a policy that has them, unless the file gives others.

    Raises
    ------
    ValueError
        A part or a setting is unknown or of another type, or parts do not go together.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a preset must be a mapping with some of {', '.join(_PARTS)}, not {str(data)[:80]!r}")
    if unknown := [key for key in data if key not in _PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}; known: {', '.join(_PARTS)}")
    parts = _DEFAULTS | {key: value for key, value in data.items() if key != "rebalance"}
    for part, default in _DEFAULTS.items():
        if type(parts[part]) is not type(default):
            wanted = "true or false" if default is False else "a name"
            raise ValueError(f"{part} must be {wanted}, not {parts[part]!r}")
    name, given = _rebalance(data.get("rebalance", "none"))
    kind = REBALANCERS.find(name).Settings
    try:
        settings: Any = make_settings(kind, _fitting(kind, defaults) | given)
    except ValueError as error:
        raise ValueError(f"rebalance policy {name!r}: {error}") from None
    made = Preset(parts["dispatch"], name, settings, suspends=parts["suspends"])
    return made.altered(parts["dispatch"], parts["admission"], name, parts["queue"])


def with_defaults(preset: Preset, defaults: Mapping[str, object]) -> Preset:
    """Return a preset whose policy has other defaults for the settings named, if it has them."""
    kind = type(preset.settings)
    return replace(preset, settings=replace(preset.settings, **_fitting(kind, defaults)))


def with_settings(preset: Preset, given: Iterable[str]) -> Preset:
    """Return a preset with settings like `rebalance.theta=0.2` in force; ValueError where one is not known or wrong."""
    found: dict[str, object] = {}
    kind = REBALANCERS[preset.rebalance].Settings
    for one in given:
        path, equals, text = one.partition("=")
        name = path.removeprefix(_PREFIX)
        if not equals or name == path:
            raise ValueError(f"--set {one}: give {_PREFIX}SETTING=VALUE, such as {_PREFIX}theta=0.2")
        if name in found:
            raise ValueError(f"--set {one}: {path} is given twice")
        try:
            found[name] = parse_setting(kind, name, text)
            make_settings(kind, {name: found[name]})
        except ValueError as error:
            raise ValueError(f"--set {one}: rebalance policy {preset.rebalance!r}: {error}") from None
    if not found:
        return preset
    return replace(preset, settings=make_settings(kind, asdict(preset.settings) | found))


def _rebalance(given: object) -> tuple[str, dict[str, object]]:
    """Return the name of the policy and its settings."""
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ValueError("rebalance must be a name, or a mapping with the name and settings")
    if not all(isinstance(key, str) for key in given):
        raise ValueError("rebalance: the names of settings must be strings")
    return given["name"], {key: value for key, value in given.items() if key != "name"}


def _fitting(kind: type, defaults: Mapping[str, object]) -> dict[str, object]:
    known = {field.name for field in fields(kind)}
    return {name: value for name, value in defaults.items() if name in known}
