"""Transports for protocols that are tested without a connection."""

import asyncio


class Nowhere(asyncio.Transport):
    """Sends nothing, and is never closed."""

    def write(self, data: object) -> None: ...

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def abort(self) -> None: ...
