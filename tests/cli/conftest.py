"""Running a command that ends before it has a model."""

import sys
import time
from collections.abc import Callable

import pytest

from ares.cli import main as cli
from ares.models import resolve as model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Run `ares` and return its exit status; a command that asks for a model ends with an error."""

    def resolve(*_: object, **__: object) -> None:
        raise model.ModelError("the model was asked for")

    monkeypatch.setattr(model, "resolve", resolve)

    def run_it(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["ares", *arguments])
        began = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert time.monotonic() - began < 60
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run_it
