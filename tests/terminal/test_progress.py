"""What long steps print where nobody sees a progress bar."""

import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from ares.terminal.progress import PlainProgress, progress_display


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=20)


def test_a_terminal_keeps_the_display() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    assert type(progress_display(terminal)) is Progress


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {}])
def test_elsewhere_a_task_is_two_lines(environment: dict[str, str]) -> None:
    """A dumb terminal cannot redraw either; and no line is folded, be it longer than the console is wide."""
    console = Console(file=io.StringIO(), width=20, force_terminal=bool(environment) or None, _environ=environment)
    with progress_display(console) as shown:
        assert isinstance(shown, PlainProgress)
        task = shown.add_task("convert [red]everything[/red] to bfloat16", total=3)
        for _ in range(4):
            shown.advance(task)
    assert lines(console) == [
        "convert [red]everything[/red] to bfloat16: started",
        "convert [red]everything[/red] to bfloat16: done after 0 s",
    ]


def test_states_are_said_in_place_of_started_and_done(console: Console) -> None:
    with progress_display(console) as shown:
        task = shown.add_task("decode-0", total=1, state="starting (log: /tmp/x)")
        shown.update(task, completed=1, state="ready")
    assert lines(console) == ["decode-0: starting (log: /tmp/x)", "decode-0: ready after 0 s"]


def test_what_is_not_done_is_named_again_and_again(console: Console) -> None:
    with PlainProgress(console, every_s=0.05) as shown:
        done, *_ = shown.add_task("first", total=1), shown.add_task("second", total=1)
        third = shown.add_task("third", total=1.0)
        shown.update(done, completed=1)
        shown.update(third, completed=0.25)
        deadline = time.monotonic() + 5
        while len(lines(console)) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines(console)[4:6] == ["still waiting after 0 s: second, third (25 %)"] * 2
    told = len(lines(console))
    time.sleep(0.15)
    assert len(lines(console)) <= told + 1, "and not once the step has ended"


def test_what_is_tracked_is_told_too(console: Console) -> None:
    with progress_display(console) as shown:
        assert list(shown.track(range(3), description="runs")) == [0, 1, 2]
    assert lines(console) == ["runs: started", "runs: done after 0 s"]
