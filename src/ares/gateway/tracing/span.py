"""What the gateway tells a tracer of a request, step by step; this one writes nothing: tracing is off."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

Attribute = str | bool | int | float | Sequence[str]
# None: not known, and left out.
Attributes = Mapping[str, Attribute | None]
NOTHING: Attributes = {}
_NO_HEADERS: Mapping[str, str] = {}


class Span:
    """A step of a request, from when it is made until its `end`; without an effect.

    As a context manager it ends with the block, and has failed where that raises.
    """

    __slots__ = ()

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers (W3C Trace Context) with which what is called becomes a part of this step."""
        return _NO_HEADERS

    def child(self, name: str, attributes: Attributes = NOTHING, *, calls: bool = False) -> "Span":
        """Begin a step within this one; `calls`: it waits for another process."""
        return self

    def event(self, name: str, attributes: Attributes = NOTHING) -> None:
        """Note what happens now."""

    def set(self, attributes: Attributes) -> None:
        """Note what is known now."""

    def end(self, failure: BaseException | None = None) -> None:
        """End the step, where it has not ended yet; with what made it fail."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(failure)


class Tracer:
    """Begins the span of each request; without an effect."""

    def begin(self, name: str, headers: Mapping[str, str], attributes: Attributes = NOTHING) -> Span:
        """Begin the span of a request with these headers: in its client's trace, where they name one."""
        return NO_SPAN

    async def close(self) -> None:
        """Send what has not been sent yet, within seconds."""

    def shutdown(self) -> None:
        """End a tracer that has nothing to send."""


NO_SPAN = Span()
NO_TRACER = Tracer()
