"""Settings of a policy: a frozen dataclass of numbers, flags and strings, made from YAML or text."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

Settings = TypeVar("Settings")
_TYPES = (bool, int, float, str)
_FLAGS = {"true": True, "false": False}


def check_settings_type(kind: type) -> None:
    """Raise TypeError where a class cannot hold settings."""
    if not is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{kind.__name__} must be a frozen dataclass")
    hints = get_type_hints(kind)
    for field in fields(kind):
        if hints[field.name] not in _TYPES:
            raise TypeError(f"setting {field.name} must be a bool, an int, a float or a str")
    kind()  # every setting has a default


def make_settings(kind: type[Settings], given: Mapping[str, object]) -> Settings:
    """Make settings; ValueError names a setting that is unknown, of another type, or out of range."""
    hints = get_type_hints(kind)
    for name, value in given.items():
        wanted = _type(hints, name)
        allowed = (int, float) if wanted is float else (wanted,)
        if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"setting {name} must be {_describe(wanted)}, not {value!r}{_hint(wanted, value)}")
    return kind(**{name: hints[name](value) for name, value in given.items()})


def parse_setting(kind: type, name: str, text: str) -> object:
    """Parse the text of a setting; ValueError where the setting is unknown or of another type."""
    wanted = _type(get_type_hints(kind), name)
    try:
        return _FLAGS[text.lower()] if wanted is bool else wanted(text)
    except (ValueError, LookupError):
        raise ValueError(f"setting {name} must be {_describe(wanted)}, not {text!r}") from None


def in_range(settings: Any, **most: float) -> None:
    """Raise ValueError where a number is negative, or larger than given here (a million by default)."""
    for field in fields(settings):
        value, limit = getattr(settings, field.name), most.get(field.name, 1e6)
        if not isinstance(value, str) and not 0 <= value <= limit:
            raise ValueError(f"setting {field.name} must be from 0 to {limit:,.12g}, not {value!r}")


def _type(hints: Mapping[str, type], name: str) -> type:
    if name not in hints:
        raise ValueError(f"unknown setting {name!r}; known: {', '.join(hints) or 'none'}")
    return hints[name]


def _hint(wanted: type, value: object) -> str:
    """Say how to write a number that YAML takes for text, such as ``2e8``."""
    try:
        number = float(value) if wanted in (int, float) and isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return f" (YAML takes this for text: write {wanted(number)!r})" if math.isfinite(number) else ""


def _describe(wanted: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[wanted]
