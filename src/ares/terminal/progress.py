"""Progress of long steps: rich's display on a terminal, plain lines where output goes to a file or a pipe."""

import threading
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID

_EVERY_S = 30.0


def progress_display(console: Console, *columns: str | ProgressColumn, transient: bool = False) -> Progress:
    """Return a progress display for this console.

    On a terminal it is rich's, with these columns. Elsewhere each task is a line when it starts and one when it is
    done, with its seconds, and every 30 s one line names the tasks that are not. A task's field `state`, where it has
    one, replaces "started" and "done" in its lines.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        return Progress(*columns, console=console, transient=transient)
    return PlainProgress(console)


class PlainProgress(Progress):
    """Progress as lines; every `every_s` seconds one names the tasks that are not done."""

    def __init__(self, console: Console, every_s: float = _EVERY_S) -> None:
        super().__init__(console=console, disable=True)
        self._every_s = every_s
        self._printed: set[TaskID] = set()
        self._stopped = threading.Event()
        self._reminder = threading.Thread(target=self._remind, daemon=True)
        self._began = self.get_time()

    def start(self) -> None:
        """Start the lines about tasks that are not done."""
        self._reminder.start()

    def stop(self) -> None:
        """Stop printing."""
        self._stopped.set()

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        """Add a task and print that it has started."""
        self._print(f"{description}: {kwargs.get('state', 'started')}")
        return super().add_task(description, *args, **kwargs)

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        """Change a task, and print that it is done where it now is."""
        super().update(task_id, **kwargs)
        self._done(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task, and print that it is done where it now is."""
        super().advance(task_id, advance)
        self._done(task_id)

    def _done(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        if task.finished and task_id not in self._printed:
            self._printed.add(task_id)
            self._print(f"{task.description}: {task.fields.get('state', 'done')} after {task.finished_time:.0f} s")

    def _remind(self) -> None:
        while not self._stopped.wait(self._every_s):
            left = ", ".join(_how_far(task) for task in self.tasks if not task.finished)
            if left:
                self._print(f"still waiting after {self.get_time() - self._began:.0f} s: {left}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _how_far(task: Task) -> str:
    return f"{task.description} ({task.percentage:.0f} %)" if task.total and task.completed else task.description
