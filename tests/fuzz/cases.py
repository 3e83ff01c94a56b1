"""How much is fuzzed, and with what: few cases of each target by default, ARES_FUZZ_TIMES as many with `make fuzz`."""

import copy
import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("ARES_FUZZ_TIMES", "1"))
ran: Counter[str] = Counter()
"""Cases by target, explicit examples and those of shrinking included."""

Test = Callable[..., None]


def fuzz(target: str, cases: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Test], Test]:
    """Run a test with so many cases of its strategies, the same ones every time where it is one of the default run."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def counted(*args: Any, **given_to_it: Any) -> None:
            ran[target] += 1
            test(*args, **given_to_it)

        wanted = settings(
            max_examples=cases * TIMES,
            derandomize=TIMES == 1,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        decorated: Test = wanted(given(**strategies)(counted))
        return decorated

    return decorate


# --- bytes ---

_EDITS = ("cut", "drop", "insert", "flip", "double")


def _edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, new in edits:
        at, size = int(where * len(data)), max(1, len(new))
        if kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + size :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "flip":
            data = data[:at] + new + data[at + len(new) :]
        else:
            data = data[:at] + data[at : at + 8 * size] + data[at:]
    return data


def edited(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """Return strategies for one of the seeds with some edits, or none."""
    places = st.floats(0, 1, exclude_max=True)
    edits = st.lists(st.tuples(st.sampled_from(_EDITS), places, st.binary(max_size=8)), max_size=4)
    return st.builds(_edited, st.sampled_from(seeds), edits)


def noise(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """Return strategies for edited seeds, and for bytes that have nothing to do with them."""
    return edited(*seeds) | edited(*seeds) | edited(*seeds) | st.binary(max_size=200)


# --- JSON ---

_DEEP = 500

# Texts that a JSON parser takes, at least Python's, and that few expect.
NASTY = [
    *("null", "true", "false", "0", "-0", "-1", "1", "2", "0.5", "1e-400", "1e308", "-1e308", "1e999", "NaN"),
    *("Infinity", "-Infinity", str(2**31), str(2**53), str(2**63 - 1), str(2**63), str(-(2**63) - 1), "9" * 400),
    *('""', '" "', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\\ud83d\\ude00"', '"nan"', '"1"', '"a\\nb"'),
    *("[]", "{}", "[null]", "[[]]", "[[1],[]]", '[1,"a"]', "[-1]", "[99999999999]", '[""]', '["\\ud800"]', '{"":null}'),
    *('{"\\ud800":1}', '{"type":"json_object"}', '{"type":"json_schema"}', '{"1":1e999}', '{"a":{"b":[1,{"c":null}]}}'),
    "[" + "0," * 300 + "0]",
    '"' + "x" * 3000 + '"',
    "9" * 5000,
    "[" * _DEEP + "]" * _DEEP,
    '{"a":' * _DEEP + "1" + "}" * _DEEP,
    # About as deep as Python's parser goes: what comes after it must not go deeper.
    *("[" * depth + "]" * depth for depth in (850, 900, 930, 945, 960, 975)),
]
_plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_values = st.recursive(
    _plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner), max_leaves=9
)
json_texts: st.SearchStrategy[str] = st.sampled_from(NASTY) | _values.map(json.dumps)


class _Raw(str):
    """A text that stands in a document as it is."""

    __slots__ = ()


def written(document: Any) -> str:
    """Return the JSON of a document in which nodes may be texts of their own."""
    if isinstance(document, _Raw):
        return str(document)
    if isinstance(document, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(value)}" for key, value in document.items()) + "}"
    if isinstance(document, list):
        return "[" + ",".join(map(written, document)) + "]"
    return json.dumps(document)


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(found for key, value in inner for found in _paths(value, (*path, key)))]


@st.composite
def warped(draw: st.DrawFn, *seeds: Any) -> str:
    """Draw the JSON of one of the seeds with some nodes replaced, taken out, or added."""
    document = [copy.deepcopy(draw(st.sampled_from(seeds)))]
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(_paths(document)[1:] or [()]))
        if not path:
            break
        *before, last = path
        parent: Any = document
        for key in before:
            parent = parent[key]
        if before and draw(st.integers(0, 4)) == 0:
            del parent[last]
        elif isinstance(parent, dict) and draw(st.integers(0, 4)) == 0:
            parent[draw(st.text(max_size=9))] = _Raw(draw(json_texts))
        else:
            parent[last] = _Raw(draw(json_texts))
    return written(document[0]) if document else ""
