"""Which objects still exist, of those that a test has made."""

import threading
import weakref
from typing import Any

import pytest


def made_here(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> "weakref.WeakSet[Any]":
    """Return the objects of a class that this thread makes from now on, as long as they exist.

    Those of other tests may live on beside them: in a failed test's traceback, or on a server in a thread of its own.
    """
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    thread = threading.get_ident()
    initialize = kind.__init__

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if threading.get_ident() == thread:
            made.add(self)

    monkeypatch.setattr(kind, "__init__", noting)
    return made
