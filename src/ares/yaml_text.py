"""YAML of users: one reader for all of it, and what reading it, and what stands in it, can raise.

PyYAML lets the last of two equal keys win, and builds whatever aliases ask for: a file of ten lines can stand for
10^10 values, which whoever walks over them never ends with.
"""

from pathlib import Path
from typing import Any

import yaml

from ares.text_files import read_text

WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What code raises on values of another kind than it expects."""
# PyYAML raises anything on a scalar that its tag does not fit, such as `!!timestamp now`, and on deep nesting.
MALFORMED = (yaml.YAMLError, *WRONG_VALUES)
# Far more than anybody writes, and read in less than a second.
_MOST_BY_ALIASES = 100_000
_LONGEST_SHOWN = 60
# Keys that have a meaning in YAML, and no value.
_SPECIAL = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")


class YamlError(yaml.YAMLError):
    """Well-formed YAML that is refused; the message, one line, begins with the line of the file."""


def parse(text: str | bytes) -> Any:
    """Return what a document stands for; None for an empty one.

    Raises
    ------
    YamlError
        A key is given twice, or aliases make too many values or go round in a circle.
    yaml.YAMLError, or another of `MALFORMED`
        It is no YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def settings(file: Path | None) -> dict[str, Any]:
    """Return the settings of a file; none where there is no file, or nothing in it.

    Raises
    ------
    TextFileError
        The file cannot be read.
    `MALFORMED`
        It is no YAML, is refused, or has something else than settings.
    """
    read = parse(read_text(file)) if file is not None else None
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ValueError(f"found a {type(read).__name__}")
    return read


class _Loader(yaml.SafeLoader):
    """A loader that counts while it composes: what it makes of the nodes follows from them alone."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        # Of each node that is complete: how many values it stands for.
        self._values: dict[int, int] = {}
        self._by_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._values:
                raise _refused(mark, f"*{event.anchor} stands for what it is a part of")
            self._by_aliases += self._values[id(node)]
            if self._by_aliases > _MOST_BY_ALIASES:
                raise _refused(mark, f"its aliases make more than {_MOST_BY_ALIASES} values")
        elif isinstance(node, yaml.MappingNode):
            self._refuse_given_twice(node)
            self._values[id(node)] = 1 + sum(self._values[id(key)] + self._values[id(one)] for key, one in node.value)
        elif isinstance(node, yaml.SequenceNode):
            self._values[id(node)] = 1 + sum(self._values[id(one)] for one in node.value)
        else:
            self._values[id(node)] = 1
        return node

    def _refuse_given_twice(self, node: yaml.MappingNode) -> None:
        # Here, before `<<` puts the keys of other mappings among them, which may be the same.
        lines: dict[object, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # others cannot be keys, which PyYAML says
                # Compared by what they stand for: 10 and 0xA are one key.
                value = (key.tag, key.value) if key.tag in _SPECIAL else self.construct_object(key)
                if value in lines:
                    shown = key.value if len(key.value) <= _LONGEST_SHOWN else f"{key.value[:_LONGEST_SHOWN]}..."
                    raise _refused(key.start_mark, f"{shown} is given twice, first in line {lines[value]}")
                lines[value] = key.start_mark.line + 1


def _refused(mark: yaml.Mark, why: str) -> YamlError:
    return YamlError(f"line {mark.line + 1}: {why}")
