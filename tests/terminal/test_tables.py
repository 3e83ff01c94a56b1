"""At 80 columns and in a pipe, every row of every table can be told from the others."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import ares
from ares.bench.live.command import show as show_live
from ares.cli.predictor import show as show_evaluation
from ares.cli.simulate import show as show_runs
from ares.policy import PRESETS
from ares.predictor.baselines import NAMES
from ares.terminal import tables

HUGE = 123_456.789


def run(name: str) -> dict[str, Any]:
    times = {"p50": HUGE, "p99": HUGE, "mean": HUGE}
    figures = {"load": 1.5, "goodput_rps": HUGE, "slo_share": 1.0, "preemptions": 1_000_000, "migrations": 1_000_000}
    return {"preset": name, "ttft_s": times, "tpot_s": times, "longest_gap_s": times, **figures}


def _runs() -> list[str]:
    show_runs([run(name) for name in PRESETS])
    return list(PRESETS)


def _live() -> list[str]:
    names = [name for name in PRESETS if name != "ares-oracle"]
    result = {"requests_with_differing_tokens": [], "simulator": [], "requests": 5}
    show_live(names, [{name: run(name) for name in names}], result)
    return names


def _evaluation() -> list[str]:
    shares = ("relative_mae", "kendall_tau", "p50_coverage", "p90_coverage")
    model = {"mae": HUGE, "crps": HUGE, "mae_interval": (HUGE, HUGE), "parameters": 10**8, **dict.fromkeys(shares, 0.5)}
    models = [{"name": name, **model} for name in NAMES]
    show_evaluation({"test": {"pairs": 5, "prompts": 5}, "models": models, "skipped": []})
    return list(NAMES)


@pytest.mark.parametrize("shown", [_runs, _live, _evaluation])
@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_whole_at_80_columns(
    shown: Any, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(tables, "Console", lambda: Console(force_terminal=terminal, color_system=None))
    names = shown()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    first = [line.split()[0] for line in lines if line.strip()]
    for name in names:
        assert first.count(name) == 1
    # Nothing is cut in the other columns either.
    assert "…" not in "".join(lines)


def test_a_pipe_gets_each_row_on_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    names = _runs()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0] for row in rows] == names
    assert {tuple(row[2:6]) for row in rows} == {("1.23e+05", "1.235e+05", "123456789.0", "123456789.0")}


def test_lines_of_text_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    sink = io.StringIO()
    monkeypatch.setattr(tables, "Console", lambda: Console(file=sink))
    tables.show("one [bold]two[/] three four five six seven")
    assert sink.getvalue() == "one [bold]two[/] three four five six seven\n"


def test_benchmarks_and_the_simulator_make_no_other_tables() -> None:
    root = Path(ares.__file__).parent
    others = [
        str(file.relative_to(root))
        for part in ("bench", "simulator", "cli/predictor.py")
        for file in ([root / part] if (root / part).is_file() else sorted((root / part).rglob("*.py")))
        if "Table(" in file.read_text()
    ]
    assert others == []
