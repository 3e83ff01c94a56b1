"""Hidden states on their way to the host, which no step waits for."""

from collections import deque
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ares.predictor.shards import half

T = TypeVar("T")


class StateCopies(Generic[T]):
    """Copies rows of a step's states to the host, in order. On a GPU the copies arrive in a later step.

    Attributes
    ----------
    sent, arrived
        How many copies were begun, and how many `take` has returned.
    """

    def __init__(self) -> None:
        self.sent = self.arrived = 0
        self._pending: deque[tuple[torch.Tensor, T, Any]] = deque()

    def send(self, states: torch.Tensor, rows: list[int], note: T) -> None:
        """Begin to copy some rows of [requests, hidden size]; `note` comes back with them."""
        self.sent += 1
        if states.device.type == "cpu":
            self._pending.append((states[rows].float(), note, None))
            return
        index = torch.tensor(rows, pin_memory=True).to(states.device, non_blocking=True)
        chosen = states.index_select(0, index)
        host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        host.copy_(chosen, non_blocking=True)
        event = torch.Event(device=states.device)
        event.record()
        self._pending.append((host, note, event))

    def take(self, *, wait: bool = False) -> list[tuple[NDArray[np.float16], T]]:
        """Return the copies that have arrived, with their notes; `wait` for all."""
        found = []
        while self._pending:
            host, note, event = self._pending[0]
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                break
            self._pending.popleft()
            self.arrived += 1
            found.append((half(host.float().numpy()), note))
        return found
