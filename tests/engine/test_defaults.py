"""Defaults on a CPU build give way to what is given, however it is spelled."""

import pytest

from ares.engine import defaults

EAGER = "--enforce-eager"


@pytest.fixture(autouse=True)
def _cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "is_cpu_build", lambda: True)


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-enforce-eager"],
        ["--compilation_config", "{}"],
        ["-cc.mode=3"],
        ["-O3"],
        ["--optimization-level", "2"],
        ["--max-cudagraph-capture-size=8"],
        [EAGER],
    ],
)
def test_compilation_that_is_asked_for_is_not_turned_off(flags: list[str]) -> None:
    made = defaults.local_flags(flags)
    assert made[-len(flags) :] == flags
    assert EAGER not in made[: -len(flags)]


def test_sizes_that_are_given_stay() -> None:
    given = ["--max_model_len", "512", "--kv_cache_memory_bytes=2G"]
    assert defaults.local_flags(given) == [EAGER, "--disable-uvicorn-access-log", *given]
    assert "--max-model-len" in defaults.local_flags([])


def test_elsewhere_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "is_cpu_build", lambda: False)
    assert defaults.local_flags(["--seed", "1"]) == ["--seed", "1"]
