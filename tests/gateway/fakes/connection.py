"""Connections of a fake: its streams break, end late, lose tokens or fail, as its faults say."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from ares.mock_engine import api
from ares.mock_engine.http import Connection, Service, server_sent_event
from ares.mock_engine.request import Request
from tests.gateway.fakes.faults import Faults


class FaultyConnection(Connection):
    """A connection of a fake; `drop` ends a request without a word of it to its client."""

    def __init__(self, service: Service, faults: Faults, drop: Callable[[Request], None]) -> None:
        super().__init__(service)
        self.faults = faults
        self.drop = drop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, behind a transport that loses what the faults say."""
        super().connection_made(cast(asyncio.Transport, FaultyTransport(cast(asyncio.Transport, transport), self)))

    def end(self, data: bytes) -> None:
        """End a stream; that of a cut request perhaps late."""
        cut = isinstance(self.work, Request) and self.work.cut is not None
        if cut and self.faults.tail_after_s:
            asyncio.get_running_loop().call_later(self.faults.tail_after_s, self._end, data, cut)
        else:
            self._end(data, cut)

    def _end(self, data: bytes, cut: bool) -> None:
        if self.transport.is_closing():
            return
        if cut and self.faults.break_at_cut:
            self.transport.abort()
        else:
            super().end(data)


class FaultyTransport:
    """A transport whose `write` loses or breaks the stream of a request."""

    def __init__(self, transport: asyncio.Transport, connection: FaultyConnection) -> None:
        self._transport = transport
        self._connection = connection
        self._muted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write a part of a stream, or what the faults make of it."""
        request, faults = self._connection.work, self._connection.faults
        if not isinstance(request, Request) or not request.stream or not request.output:
            self._transport.write(data)
            return
        self._muted |= faults.mute_after is not None and len(request.output) > faults.mute_after
        if self._muted:
            return
        ended = request.state == "finished"
        if not ended and faults.break_after is not None and len(request.output) >= faults.break_after:
            self._transport.abort()
            return
        self._transport.write(data)
        if not ended and faults.error_in_stream is not None:
            self._connection.drop(request)
            error = {"message": "the engine failed", "code": faults.error_in_stream}
            self._connection.end(server_sent_event({"error": error}) + api.DONE)
