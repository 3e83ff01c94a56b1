"""Settings from flags, variables and a YAML file, resolved in that order, with errors that name what is wrong."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from ares import yaml_text
from ares.text_files import TextFileError
from ares.yaml_text import MALFORMED, YamlError

S = TypeVar("S", bound=BaseSettings)


def resolve(
    settings: type[S],
    file: Path | None,
    flags: Mapping[str, Any],
    refuse: Callable[[str], Exception],
    explain: Callable[[ErrorDetails], str],
    example: str,
    variables: Callable[[type[BaseSettings]], PydanticBaseSettingsSource] | None = None,
) -> S:
    """Return the settings; a flag takes precedence over a variable, and that over the file.

    Parameters
    ----------
    settings
        Their class.
    file
        YAML file with any of them.
    flags
        Those of the command line.
    refuse
        Makes the error of a message.
    explain
        Says what is wrong with a setting, of pydantic's first error.
    example
        A line that the file might have.
    variables
        Reads the variables; by default as pydantic does.

    Raises
    ------
    Exception
        What `refuse` makes: a setting is unknown, missing or wrong, or the file cannot be read.
    """

    class Resolved(settings):  # type: ignore[misc, valid-type] # a class that is a parameter
        @field_validator("*", mode="before")
        @classmethod
        def _no_truth_values_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
            """Refuse `threads: true`, which pydantic takes for 1."""
            given = value if isinstance(value, list) else [value]
            expected = settings.model_fields[str(info.field_name)].annotation
            if any(isinstance(one, bool) for one in given) and not _mentions(expected, bool):
                raise ValueError("true and false are no values of this setting")
            return value

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            **_: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            from_variables = variables(settings_cls) if variables is not None else env_settings
            return init_settings, from_variables, InitSettingsSource(settings_cls, yaml_text.settings(file))

    if file is not None and not file.is_file():
        raise refuse(f"{file}: no such file")
    try:
        resolved: S = Resolved(**flags)
    except ValidationError as error:
        # Not `from error`: pydantic's own text shows what was given, which may be a key.
        raise refuse(explain(error.errors()[0])) from None
    except SettingsError as error:  # of a variable, which the cause names
        raise refuse(str(error.__cause__ or error)) from None
    except TextFileError as error:
        raise refuse(str(error)) from None
    except YamlError as error:
        raise refuse(f"{file}: {error}") from None
    except MALFORMED as error:
        raise refuse(f"{file}: should be lines such as `{example}` ({error})") from error
    return resolved


def _mentions(annotation: Any, kind: type) -> bool:
    """Whether a type is this one, or made of it and others."""
    return annotation in (kind, Any) or any(_mentions(part, kind) for part in get_args(annotation))
