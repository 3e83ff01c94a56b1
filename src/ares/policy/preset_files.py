"""Presets as data: what the YAML file of a preset holds, and single settings that change one. No I/O here."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ares.policy.admission import ADMISSIONS
from ares.policy.presets import Preset, check_parts
from ares.policy.registering import REGISTRIES
from ares.policy.settings import make_settings, parse_setting

# Keys of preset files from before each admission policy had its own settings.
_REPLACED = {"queue": "order", "suspends": "suspends"}


def make_preset(data: object, defaults: Mapping[str, object]) -> Preset:
    """Make a preset from the contents of its file.

    Parameters
    ----------
    data
        {prefill, dispatch, admission, rebalance, copies}, each a name or {name, settings...}; parts that are missing
        are those of `static-least-loaded`, except for the dispatch, which is the one that the admission needs.
    defaults
        Settings for a rebalance policy that has them, unless the file gives others.

    Raises
    ------
    ValueError
        A part or a setting is unknown or of another type, or parts cannot be combined.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a preset must be a mapping with some of {', '.join(REGISTRIES)}, not {str(data)[:80]!r}")
    for key in data:
        if key in _REPLACED:
            raise ValueError(f"{key} is now a setting: give admission: {{name: forecast, {_REPLACED[key]}: ...}}")
        if key not in REGISTRIES:
            raise ValueError(f"unknown part {key!r}; known: {', '.join(REGISTRIES)}")
    found: dict[str, Any] = {}
    for part, given in data.items():
        name, settings = _part(part, given)
        kind = REGISTRIES[part].find(name).Settings
        usual = _fitting(kind, defaults) if part == "rebalance" else {}
        try:
            found |= {part: name, f"{part}_settings": make_settings(kind, usual | settings)}
        except ValueError as error:
            raise ValueError(f"{part} policy {name!r}: {error}") from None
    admission = ADMISSIONS[found.get("admission", Preset.__dataclass_fields__["admission"].default)]
    if "dispatch" not in found and admission.queues_requests:
        found["dispatch"] = admission.dispatch
    made = Preset(**found)
    check_parts(made)
    return made


def with_defaults(preset: Preset, defaults: Mapping[str, object]) -> Preset:
    """Return a preset whose rebalance policy has other defaults for the settings named, if it has them."""
    settings = preset.rebalance_settings
    return replace(preset, rebalance_settings=replace(settings, **_fitting(type(settings), defaults)))


def with_settings(preset: Preset, given: Iterable[str]) -> Preset:
    """Return a preset with settings such as `rebalance.theta=0.2` replaced; ValueError where one is wrong."""
    found: dict[str, dict[str, object]] = {part: {} for part in REGISTRIES}
    for one in given:
        path, equals, text = one.partition("=")
        part, dot, name = path.partition(".")
        if not equals or not dot or part not in REGISTRIES:
            parts = " or ".join(f"{known}.SETTING=VALUE" for known in REGISTRIES)
            raise ValueError(f"--set {one}: give {parts}, such as rebalance.theta=0.2")
        if name in found[part]:
            raise ValueError(f"--set {one}: {path} is given twice")
        policy = getattr(preset, part)
        kind = REGISTRIES[part][policy].Settings
        try:
            found[part][name] = parse_setting(kind, name, text)
            make_settings(kind, {name: found[part][name]})
        except ValueError as error:
            raise ValueError(f"--set {one}: {part} policy {policy!r}: {error}") from None
    changed: dict[str, Any] = {}
    for part, settings in found.items():
        if settings:
            kind = REGISTRIES[part][getattr(preset, part)].Settings
            changed[f"{part}_settings"] = make_settings(kind, asdict(getattr(preset, f"{part}_settings")) | settings)
    return replace(preset, **changed)


def _part(part: str, given: object) -> tuple[str, dict[str, object]]:
    """Return the name of a policy and its settings."""
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ValueError(f"{part} must be a name, or a mapping with the name and settings")
    if not all(isinstance(key, str) for key in given):
        raise ValueError(f"{part}: the names of settings must be strings")
    return given["name"], {key: value for key, value in given.items() if key != "name"}


def _fitting(kind: type, defaults: Mapping[str, object]) -> dict[str, object]:
    known = {field.name for field in fields(kind)}
    return {name: value for name, value in defaults.items() if name in known}
