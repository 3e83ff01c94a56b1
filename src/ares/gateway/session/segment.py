"""The part of an output that one instance generates."""

from dataclasses import dataclass

from ares.gateway.pool.instance import Instance
from ares.gateway.pool.stream import Stream
from ares.gateway.session.pinned_kv import Pin
from ares.gateway.tracing.span import NO_SPAN, Span


@dataclass(slots=True)
class Segment:
    """What one instance generates of a session.

    Attributes
    ----------
    key
        Name of the request on that instance.
    base
        Output tokens of the session before this segment.
    pin
        The KV that it pulls.
    span
        Of the call that generates it.
    """

    instance: Instance
    key: str
    base: int
    stream: Stream
    pin: Pin | None = None
    span: Span = NO_SPAN
