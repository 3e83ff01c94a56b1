"""Bodies of requests: null fields, long lists, errors."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, FailFast, model_validator

T = TypeVar("T")


class _FirstMistake(FailFast):
    """Ends the look at a list at its first mistake; pydantic's own cannot be hashed, as unions of types want it."""

    __hash__ = object.__hash__


Listed = Annotated[list[T], _FirstMistake()]


class BadRequestError(ValueError):
    """The request cannot be served as it is; `param` names the field, `code` is OpenAI's error code."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def refuse_not_offered(given: Mapping[str, Any], not_offered: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raise BadRequestError for a field that is not offered.

    Parameters
    ----------
    not_offered
        Of each such field, the values that have no effect and are taken, and what to do instead.
    """
    for name, (without_effect, instead) in not_offered.items():
        if name in given and given[name] not in without_effect:
            raise BadRequestError(f"{name} is not offered here: {instead}", name)


def _nullable(schema: dict[str, Any]) -> None:
    """Make every optional field nullable in the schema of a body."""
    fields: dict[str, Any] = schema["properties"]
    for name in fields.keys() - schema.get("required", []):
        if {"type": "null"} not in fields[name].get("anyOf", []):
            fields[name] = {"anyOf": [fields[name], {"type": "null"}]}


_encode = msgspec.json.Encoder(enc_hook=lambda body: body.model_dump()).encode


class Body(BaseModel):
    """An object in a request: a field that is null is absent, as in OpenAI's API; unknown fields are kept."""

    # Neither NaN nor an infinite number means anything in a field, and JSON, in which an engine is asked, has neither.
    model_config = ConfigDict(extra="allow", json_schema_extra=_nullable, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    def check_text(self) -> None:
        """Refuse text that no engine can be sent: half a surrogate pair, endless nesting."""
        try:
            _encode(self.__dict__ | (self.model_extra or {}))
        except (UnicodeEncodeError, RecursionError):
            for name, value in self:
                self._check_field(name, value)
            raise

    def _check_field(self, name: str, value: Any) -> None:
        try:
            _encode({name: value})
        except UnicodeEncodeError as error:
            raise BadRequestError(f"{name}: {error}", name) from error
        except RecursionError as error:
            raise BadRequestError(f"{name}: nested too deeply", name) from error
