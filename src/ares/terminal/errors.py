"""How a command ends with an error that its user can mend: one line, and a status."""

import sys
from typing import NoReturn

from rich.console import Console

_errors = Console(stderr=True)


def fail(message: str, status: int = 2) -> NoReturn:
    """Print an error and end."""
    _errors.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
