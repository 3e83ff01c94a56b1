"""A user's YAML: what stands there twice, or grows by its aliases, is refused; every reader of ours says so."""

import datetime
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ares import config, plugins, yaml_text
from ares.engine import given_flags
from ares.gateway.discovery.base import SourceError
from ares.gateway.discovery.file import read_urls
from ares.learner import settings as learner
from ares.learner.errors import LearnerError
from ares.simulator.classes import ClassesError, read_classes
from ares.yaml_text import MALFORMED, YamlError, parse

# 10 lines, of which each has 10 times the values of the one before.
BOMB = "l0: &l0 [x]\n" + "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 10))
MERGED_BOMB = "l0: &l0 {x: 1}\n" + "".join(
    f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
)


@pytest.fixture(autouse=True)
def _timestamps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: vLLM imports a package that lets PyYAML read timestamps as text."""
    own = yaml.constructor.SafeConstructor.construct_yaml_timestamp
    monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:timestamp", own)


@pytest.mark.parametrize("text", ["!!timestamp now", "!!bool now", "!!int x", "!!int ''", "[", "[" * 5000, "a: 1\n---"])
def test_malformed_yaml(text: str) -> None:
    with pytest.raises(MALFORMED):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: a is given twice, first in line 1"),
        ("one:\n  b: 1\n  'b': 2\n", "line 3: b is given twice, first in line 2"),
        ("- {c: 1,\n   c: 1}\n", "line 2: c is given twice, first in line 1"),
        ("10: 1\n0xA: 2\n", "line 2: 0xA is given twice, first in line 1"),  # one value, spelt in two ways
        ("a: &x 1\n*x : 1\n1: 2\n", "line 3: 1 is given twice"),
        ("x: &x {}\na: {<<: *x,\n <<: *x}\n", "line 3: << is given twice"),
        ("k" * 900 + ": 1\n" + "k" * 900 + ": 1\n", "line 2: " + "k" * 60 + "... is given twice"),
        (BOMB, "line 6: its aliases make more than 100000 values"),
        (MERGED_BOMB, "its aliases make more than 100000 values"),
        ("a: &a\n  b: *a\n", "line 2: *a stands for what it is a part of"),
        ("&a [*a]", "line 1: *a stands for what it is a part of"),
    ],
)
def test_refused(text: str, message: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(YamlError) as caught:
            parse(given)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_yaml_is_used_for_stays() -> None:
    text = """
    base: &base {a: 1, b: [x, y]}
    own: {<<: *base, a: 2}
    also: {a: 3, <<: *base}
    both: {<<: [*base, {c: 4}]}
    again: *base
    '=': 5
    when: 2026-01-01
    """
    base = {"a": 1, "b": ["x", "y"]}
    assert parse(text) == {
        "base": base,
        "own": base | {"a": 2},
        "also": base | {"a": 3},
        "both": base | {"c": 4},
        "again": base,
        "=": 5,
        "when": datetime.date(2026, 1, 1),
    }
    assert parse("") is None
    # Only aliases count: a long list is a long list.
    assert len(parse("[" + "1, " * 110_000 + "]")) == 110_000


def preset_file(path: Path) -> object:
    return plugins.preset(str(path))


READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "gateway": (lambda path: config.load(path, model="m", workers=["http://a:1"]), config.ConfigError),
    "learner": (lambda path: learner.load(path, {"folder": "f", "workers": ["http://a:1"]}), LearnerError),
    "learner --set": (lambda path: learner.assignments([f"looks={path.read_text()}"]), LearnerError),
    "preset": (preset_file, ValueError),
    "classes": (read_classes, ClassesError),
    "flags of vLLM": (lambda path: given_flags.expand(["--config", str(path)]), given_flags.FlagFileError),
    "instances": (read_urls, SourceError),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nport: 2\n", "line 2: port is given twice, first in line 1"),
        (BOMB, "line 6: its aliases make more than 100000 values"),
        ("a: &a [*a]\n", "line 1: *a stands for what it is a part of"),
    ],
)
def test_every_reader_refuses_it(tmp_path: Path, reader: str, text: str, message: str) -> None:
    read, error = READERS[reader]
    path = tmp_path / "given.yaml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        read(path)
    assert message in str(caught.value)


def test_there_is_no_other_reader() -> None:
    """Whoever reads YAML in another way accepts what is refused here."""
    own = Path(yaml_text.__file__)
    others = [file for file in own.parent.rglob("*.py") if file != own]
    assert others
    other = re.compile(r"^import yaml|^from yaml|YamlConfig", re.MULTILINE)
    assert [file for file in others if other.search(file.read_text())] == []
