"""Structured outputs of a request: OpenAI's `response_format`, and vLLM's `structured_outputs` (0.32).

An instance checks what is inside: the schema, the regular expression, the grammar.
"""

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ares.gateway.openai.body import Body, Listed

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class StructuredOutputs(Body):
    """vLLM's own form (`StructuredOutputsParams`): one constraint, and options of it."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Listed[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in _CONSTRAINTS if name in self.parameters()]
        if len(given) != 1:
            listed = " and ".join(given) or "none"
            raise ValueError(f"one constraint is needed, of {', '.join(_CONSTRAINTS)}; given: {listed}")
        if self.json_object is False:
            raise ValueError("json_object must be true where it is given")
        for text in (self.json_, self.grammar, self.structural_tag):
            if isinstance(text, str) and not text.strip():
                raise ValueError(f"{given[0]} must not be empty")
        if "\0" in (self.regex or ""):
            raise ValueError("regex must not contain NUL")
        return self

    def parameters(self) -> dict[str, Any]:
        """Return them as an instance takes them."""
        return self.model_dump(by_alias=True, include=set(type(self).model_fields), exclude_unset=True)


class JsonSchema(Body):
    """A JSON schema and its name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Structure(Body):
    """Text that a JSON schema holds for, and what begins and ends it."""

    begin: str
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    end: str


class ResponseFormat(Body):
    """OpenAI's forms, and vLLM's `structural_tag`, of xgrammar's two kinds."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: Any = None
    structures: Listed[Structure] | None = None
    triggers: Listed[str] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type json_schema needs json_schema with a schema")
        if self.type == "structural_tag" and self.format is None and (self.structures is None or self.triggers is None):
            raise ValueError("type structural_tag needs format, or structures and triggers")
        return self

    def constraint(self) -> dict[str, Any] | None:
        """Return what it is in vLLM's own form; None: any text."""
        if self.type == "json_object":
            return {"json_object": True}
        if self.json_schema is not None and self.type == "json_schema":
            return {"json": self.json_schema.schema_}
        if self.type == "structural_tag":
            return {"structural_tag": json.dumps(self.model_dump(by_alias=True, exclude_unset=True))}
        return None
