"""The writes of one round of the event loop, one after the other at its end."""

import asyncio


class RoundOfWrites:
    """What is to be written in this round: to each client at once, and to one client after the other.

    To send a token, the kernel takes longer than the gateway takes to make it, and displaces the gateway's code and
    data from the processor's caches. So the tokens of a step are all made first, and then all sent.
    """

    def __init__(self) -> None:
        # Parts in a list only where there are several: most clients get one token in a round.
        self._waiting: dict[asyncio.Transport, bytes | list[bytes]] = {}

    def add(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write data at the end of the round, behind what waits for it already."""
        waiting = self._waiting
        if not waiting:
            asyncio.get_running_loop().call_soon(self._end)
        before = waiting.get(transport)
        if before is None:
            waiting[transport] = data
        elif isinstance(before, list):
            before.append(data)
        else:
            waiting[transport] = [before, data]

    def flush(self, transport: asyncio.Transport) -> None:
        """Write now what waits for the end of the round, for one client."""
        if (data := self._waiting.pop(transport, None)) is not None and not transport.is_closing():
            transport.write(_joined(data))

    def _end(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for transport, data in waiting.items():
            if not transport.is_closing():
                transport.write(_joined(data))


def _joined(data: bytes | list[bytes]) -> bytes:
    return data if isinstance(data, bytes) else b"".join(data)
