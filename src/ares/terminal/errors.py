"""Errors that a user can correct: one line, and a status."""

import sys
from typing import NoReturn

from rich.console import Console

_errors = Console(stderr=True)


def exit_with_error(message: str, status: int = 2) -> NoReturn:
    """Print an error and exit."""
    _errors.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
