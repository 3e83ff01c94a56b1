"""Predicts the running requests of an instance from their hidden states, a few steps apart."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ares.engine.prediction import carried_forecast
from ares.engine.prediction.hidden_states import HookedRequest, Step
from ares.engine.prediction.metadata import PENDING, Prediction
from ares.predictor import checkpoint, hazard
from ares.predictor.errors import PredictorError
from ares.predictor.runtime import Known, Predictor
from ares.protocol import messages

# Steps between predictions of new requests, all together: one for many costs little more than one for one.
_NEW_EVERY = 5


class LivePredictor:
    """Predicts all running requests every `every` steps, and new requests together within their first few steps.

    A request that is only prefilled here has no later step: it is predicted in that step, with all other new requests.

    On a GPU no step waits for a prediction, except for one with a prefill: the quantiles are copied to the host after
    the step and read in a later one.
    """

    def __init__(self, loaded: checkpoint.Checkpoint, slots: int, device: str, every: int) -> None:
        self._predictor = Predictor(loaded, slots, device)
        self._device = device
        self._every = every
        self._hidden_size = loaded.hidden_size
        self._free = list(range(slots))
        self._slots: dict[str, int] = {}
        self._steps = 0
        self._forecaster = self._predictor.forecaster()
        self._pending: tuple[_Predicted, Any] | None = None
        # Interpolates the quantiles at REMAINING_LEVELS between the two nearest levels of the predictor.
        levels, wanted = torch.tensor(hazard.LEVELS), torch.tensor(messages.REMAINING_LEVELS)
        right = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        share = (wanted - levels[right - 1]) / (levels[right] - levels[right - 1])
        between, each = torch.zeros(len(levels), len(wanted)), torch.arange(len(wanted))
        between[right - 1, each], between[right, each] = 1 - share, share
        self._between = between.to(device)

    def warm_up(self) -> None:
        """Make one prediction, for no request; PredictorError where it is not finite."""
        one = torch.zeros(1, dtype=torch.int64, device=self._device)
        state = self._predictor.checkpoint.center.to(self._device)[None]
        quantiles = (self._predictor.predict(one, state, one, one + 1, one) @ self._between).tolist()[0]
        self._predictor.forget([0])
        if not math.isfinite(sum(quantiles)):
            raise PredictorError("it predicts values that are not finite")

    def withdraw(self) -> None:
        """Take the predictions of all running requests back."""
        self._pending = None
        PENDING.clear()
        PENDING.update(dict.fromkeys(self._slots))

    def step(self, step: Step) -> None:
        """Process one step."""
        if self._pending is not None:
            self._collect()
        for request in step.finished:
            if (slot := self._slots.pop(request.id, None)) is not None:
                self._free.append(slot)
                PENDING.pop(request.id, None)
        if step.states is None:
            return
        self._steps += 1
        if due := self._due(step.requests):
            self._predict(step.states, due)

    def _due(self, requests: list[HookedRequest]) -> list[tuple[int, HookedRequest]]:
        """Return the requests to predict in this step, each with its row."""
        everyone = self._steps % self._every == 0
        if self._steps % _NEW_EVERY and not everyone and not any(r.prefill_only and r.position >= 0 for r in requests):
            return []
        known = () if everyone else self._slots
        return [(n, r) for n, r in enumerate(requests) if r.position >= 0 and not r.is_precopy and r.id not in known]

    def _predict(self, states: torch.Tensor, due: list[tuple[int, HookedRequest]]) -> None:
        rows, slots, positions, prompts = list[int](), list[int](), list[int](), list[int]()
        names, new, first = list[tuple[str, int]](), list[int](), list[int]()
        carried: dict[int, carried_forecast.Carried] = {}
        for n, request in due:
            slot = self._slots.get(request.id)
            if slot is None:
                if not self._free:
                    continue
                slot = self._slots[request.id] = self._free.pop()
                new.append(slot)
                known = self._decode(request.first_forecast)
                if known is not None:
                    carried[slot] = known
                else:
                    first.append(len(rows))
            rows.append(n)
            slots.append(slot)
            positions.append(request.position + request.generated_before)
            prompts.append(len(request.prompt_tokens) - request.generated_before)
            names.append((request.id, request.position))
        if not rows:
            return
        if new:
            self._predictor.forget(new)
        if carried:
            self._adopt(carried)
        index = torch.tensor([rows, slots, positions, prompts]).to(self._device, non_blocking=True)
        need = torch.tensor(first, dtype=torch.int64).to(self._device, non_blocking=True)
        wanted = self._predictor.predict(index[1], states[index[0]], index[2], index[3], need) @ self._between
        result = _Predicted(names, wanted, self._predictor.known(index[1]) if self._forecaster else None)
        self._collect(wait=True)
        if wanted.device.type == "cpu" or any(request.prefill_only for _, request in due):
            self._post(result)
            return
        on_host = result.to_host()
        event = torch.Event(device=wanted.device)
        event.record()
        self._pending = (on_host, event)

    def _decode(self, text: Any) -> carried_forecast.Carried | None:
        return carried_forecast.decode(text, self._forecaster, self._predictor.edges, self._hidden_size)

    def _adopt(self, carried: dict[int, carried_forecast.Carried]) -> None:
        each = list(carried.values())
        on_host = Known(
            torch.from_numpy(np.stack([c.ended for c in each])),
            torch.tensor([c.position for c in each]),
            torch.tensor([c.averaged for c in each]),
            torch.from_numpy(np.stack([c.mean for c in each])),
            torch.tensor([c.step for c in each]),
        )
        slots = torch.tensor(list(carried)).to(self._device, non_blocking=True)
        self._predictor.adopt(slots, _each(on_host, lambda tensor: tensor.to(self._device, non_blocking=True)))

    def _collect(self, *, wait: bool = False) -> None:
        """Post the predictions that have reached the host; `wait` for them where the next ones are due already."""
        if self._pending is None:
            return
        result, event = self._pending
        if wait:
            event.synchronize()
        if wait or event.query():
            self._pending = None
            self._post(result)

    def _post(self, result: "_Predicted") -> None:
        every = result.carried(self._forecaster)
        for (name, output), (low, middle, high), carried in zip(
            result.names, result.quantiles.tolist(), every, strict=True
        ):
            # A value that is not finite must never reach a decision: the request then has no prediction.
            if math.isfinite(low + middle + high) and name in self._slots:
                PENDING[name] = Prediction(output, (low, middle, high), carried)
            else:
                PENDING.pop(name, None)


@dataclass(frozen=True, slots=True)
class _Predicted:
    """The predictions of a step, on the device or on the host.

    Attributes
    ----------
    names
        Of each request vLLM's id, and the tokens that it had generated.
    quantiles
        [requests, REMAINING_LEVELS].
    known
        What is known of the requests; None where the network has no history.
    """

    names: list[tuple[str, int]]
    quantiles: torch.Tensor
    known: Known | None

    def to_host(self) -> "_Predicted":
        """Begin to copy the tensors to the host, behind the work of the device."""
        known = None if self.known is None else _each(self.known, _begin_copy)
        return _Predicted(self.names, _begin_copy(self.quantiles), known)

    def carried(self, forecaster: str) -> Iterator[carried_forecast.Carried | None]:
        """Return what is known of each request, for its next instance."""
        if self.known is None:
            yield from [None] * len(self.names)
            return
        known = _each(self.known, torch.Tensor.cpu)
        ended, mean = known.forecasts.numpy(), known.mean.numpy()
        numbers = zip(known.position.tolist(), known.averaged.tolist(), known.step.tolist(), strict=True)
        for n, (position, averaged, step) in enumerate(numbers):
            yield carried_forecast.Carried(forecaster, position, ended[n], int(averaged), mean[n], step)


def _each(known: Known, change: Callable[[torch.Tensor], torch.Tensor]) -> Known:
    return Known(*(change(getattr(known, field.name)) for field in fields(known)))


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
