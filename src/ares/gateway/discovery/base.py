"""What a source of instances is: it tells which URLs there are, again whenever that may have changed."""

from collections.abc import AsyncGenerator, Iterable
from typing import Protocol

from ares.instance_sources import check_url

MAXIMUM_INSTANCES = 4096
"""Most instances that one source may name: more are a mistake, and each is asked several times a second."""


class SourceError(Exception):
    """A source cannot tell which instances there are; the message says why, and what to do."""


class Source(Protocol):
    """A source of instances.

    Attributes
    ----------
    name
        The setting that it was made from.
    """

    name: str

    def states(self) -> AsyncGenerator[list[str]]:
        """Yield all URLs now, and again whenever they may have changed.

        Raises
        ------
        SourceError
            It cannot tell, or what it reads is wrong. What it has yielded stays in force; it is asked again later.
        """
        ...


def checked(urls: Iterable[str]) -> list[str]:
    """Return the URLs, each once; SourceError says which one is wrong, or that there are too many."""
    found: dict[str, None] = {}
    for url in urls:
        try:
            found[check_url(url)] = None
        except ValueError as error:
            raise SourceError(str(error)) from None
        if len(found) > MAXIMUM_INSTANCES:
            raise SourceError(f"it names more than {MAXIMUM_INSTANCES} instances")
    return list(found)
