"""`ARES_*` variables: a source of settings whose errors name the variable, and warnings about unused ones."""

import difflib
import json
import os
import re
import typing
from collections.abc import Collection, Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource

from ares.protocol.fields import ALLOW_UNSUPPORTED_VLLM_VARIABLE, INSTANCE_VARIABLE

PREFIX = "ARES_"
# Settings of the learner (`ares predictor learn`), which checks them itself.
LEARNER_PREFIX = "ARES_LEARNER_"
# Not settings of a gateway: other commands and our tests read these.
_OTHERS = frozenset(
    [
        ALLOW_UNSUPPORTED_VLLM_VARIABLE,
        "ARES_CACHE",
        "ARES_CHAOS_PLAN",
        "ARES_FUZZ_JSON",
        "ARES_FUZZ_TIMES",
        INSTANCE_VARIABLE,
        "ARES_MATRIX_JSON",
        "ARES_URL",
    ]
)
# Kubernetes gives every pod the addresses of the Services of its namespace, in variables that begin with their names.
_SERVICE_NAME = re.compile(
    r"ARES_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_ADDR|_PORT|_PROTO)?)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+", re.IGNORECASE)


def variable(setting: str) -> str:
    """Return the name of the variable of a setting."""
    return PREFIX + setting.upper()


def given() -> dict[str, str]:
    """Return the variables of ours that are set; as in pydantic-settings, their case does not count."""
    return {name.upper(): value for name, value in os.environ.items() if name.upper().startswith(PREFIX)}


def warnings(settings: Collection[str], flags: Collection[str] = (), overruled: Collection[str] = ()) -> Iterator[str]:
    """Yield a warning with the reason for every variable without an effect.

    Parameters
    ----------
    settings
        Names of all settings.
    flags
        Names of those that are given by flags, which win over variables anyway.
    overruled
        Names of those that the command sets, whether its flags are given or not.
    """
    known = {variable(setting) for setting in settings}
    for name, value in sorted(given().items()):
        if name in map(variable, overruled):
            if not _names_a_service(name, value):
                yield f"{name} has no effect on this command, which sets that itself: use its flags"
        elif name in known:
            if _names_a_service(name, value) and name not in map(variable, flags):
                yield (
                    f"{name} is {value}, which Kubernetes sets for a Service called `ares`: it is not used; rename "
                    "the Service, set enableServiceLinks: false, or give the setting by a flag"
                )
        elif not name.startswith(LEARNER_PREFIX) and not has_other_use(name, value):
            others = [other.removeprefix(PREFIX) for other in (*known, *_OTHERS)]
            similar = difflib.get_close_matches(name.removeprefix(PREFIX), others, 1)
            hint = f"; did you mean {PREFIX}{similar[0]}?" if similar else ""
            yield f"{name} is not a variable of ARES and has no effect{hint}"


class Variables(EnvSettingsSource):
    """The variables as pydantic-settings reads them; lists also with commas, and without those of Kubernetes.

    `flags` are the settings given by flags: their variables are ignored.
    """

    def __init__(self, settings: type[BaseSettings], flags: Collection[str]) -> None:
        super().__init__(settings)
        self._flags = flags

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the text of a variable, its field, and whether it is JSON; ValueError where it is empty."""
        value, key, is_complex = super().get_field_value(field, field_name)
        if value is not None and not str(value).strip() and field_name not in self._flags:
            # Not taken as absent: no key would admit everybody, and an empty host is every address.
            raise ValueError(f"{variable(field_name)} is empty: give it a value, or unset it")
        if value is not None and (field_name in self._flags or _names_a_service(variable(field_name), value)):
            value = None
        return value, key, is_complex

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Decode a list or a mapping; ValueError, without the value, which may be a key, where it is neither."""
        text = str(value).strip()
        is_list = typing.get_origin(field.annotation) is list
        if is_list and not text.startswith(("[", "{")):
            items = [item.strip() for item in text.removesuffix(",").split(",")]
            if all(items) and not re.search(r"[\s\"']", "".join(items)):
                return items
        else:
            try:
                return json.loads(text)
            except ValueError:
                pass
        example = json.dumps(field.examples[0]) if field.examples else "JSON"
        form = (
            f"a JSON list, such as {example}, or items separated by commas" if is_list else f"JSON, such as {example}"
        )
        raise ValueError(f"{variable(field_name)} must be {form}")


def has_other_use(name: str, value: str) -> bool:
    """Whether a variable is no setting of a service: other commands read it, or Kubernetes has set it."""
    return name in _OTHERS or _SERVICE_NAME.fullmatch(name) is not None or _names_a_service(name, value)


def _names_a_service(name: str, value: str) -> bool:
    return name.endswith("PORT") and _SERVICE_ADDRESS.fullmatch(value) is not None
