"""Inference for running requests: what the decode worker runs, and what evaluation times."""

import hashlib
from dataclasses import dataclass

import torch

from ares.predictor import features, first_forecast
from ares.predictor.checkpoint import Checkpoint
from ares.predictor.features import History


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of requests apart from their newest states; tensors on one device.

    Attributes
    ----------
    forecasts
        [requests, edges] the forecasts from their first states: the chances to have ended.
    position
        [requests] tokens generated before those states.
    averaged
        [requests] how many states are in the average.
    mean, step
        [requests, d] int8 and [requests]: the average, as `features.compact` makes it.
    """

    forecasts: torch.Tensor
    position: torch.Tensor
    averaged: torch.Tensor
    mean: torch.Tensor
    step: torch.Tensor


class Predictor:
    """Predicts for up to `slots` requests at a time; each keeps its history in a slot.

    Everything stays on the device of the states, and no call waits for it.
    """

    def __init__(self, checkpoint: Checkpoint, slots: int, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self._network = checkpoint.network.fused().to(device).eval()
        self._center = checkpoint.center.to(device)
        self._scale = checkpoint.scale.to(device)
        self._history = History(slots, checkpoint.hidden_size, device)
        # Of each request: its forecast from the first state, if the network has such, and the position of that.
        self._forecasts = torch.zeros(slots, self.edges, device=device)
        self._forecast_at = torch.zeros(slots, dtype=torch.int64, device=device)

    @property
    def edges(self) -> int:
        """How many numbers the forecast from a first state has; 0 where there are no such forecasts."""
        return 0 if self._network.first is None else len(self._network.grid)

    def forecaster(self) -> str:
        """Return an id of the network that forecasts from first states, and of how states are standardised.

        Equal ones give equal forecasts, and averages that mean the same. Empty for a network without a history.
        """
        if self.checkpoint.arch != "ours":
            return ""
        first = self.checkpoint.network.first
        weights = (*(() if first is None else first.state_dict().values()), self._center, self._scale)
        return hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in weights)).hexdigest()[:16]

    def known(self, slots: torch.Tensor) -> "Known":
        """Return what is known of these requests apart from their newest states."""
        averaged, mean = self._history.averages(slots)
        return Known(self._forecasts[slots], self._forecast_at[slots], averaged, *features.compact(mean))

    def adopt(self, slots: torch.Tensor, known: "Known") -> None:
        """Take what was known of requests elsewhere; their slots are empty."""
        self._take(slots, known.forecasts, known.position)
        self._history.resume(slots, known.averaged, features.expand(known.mean, known.step))

    def _take(self, slots: torch.Tensor, forecasts: torch.Tensor, position: torch.Tensor) -> None:
        self._forecasts[slots] = forecasts
        self._forecast_at[slots] = position

    def forget(self, slots: list[int]) -> None:
        """Empty slots for other requests."""
        self._history.clear(slots)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def predict(
        self,
        slots: torch.Tensor,
        states: torch.Tensor,
        position: torch.Tensor,
        prompt_length: torch.Tensor,
        first: torch.Tensor,
    ) -> torch.Tensor:
        """Add new states to their requests' histories and return quantiles.

        Parameters
        ----------
        slots
            [batch] int64.
        states
            [batch, d] of any floating type.
        position, prompt_length
            [batch] tokens generated before the state, and of the prompt.
        first
            [n] int64 rows of the batch whose requests need a forecast from this state, their first.

        Returns
        -------
        torch.Tensor
            [batch, levels] float32 remaining tokens at `hazard.LEVELS`, the request's own limit not yet applied.
        """
        standard = features.standardised(states, self._center, self._scale)
        mean, similarity = self._history.update(slots, standard)
        scalars = features.scalars(position, prompt_length, similarity)
        if self._network.first is not None:
            if len(first):
                given = standard[first], position[first], prompt_length[first]
                self._take(slots[first], first_forecast.forecast(self._network.first, *given), position[first])
            elapsed = position - self._forecast_at[slots]
            known = first_forecast.logits(self._forecasts[slots], self._network.grid, elapsed)
            scalars = torch.cat([scalars, known], 1)
        quantiles: torch.Tensor = self._network.quantiles(torch.cat([standard, mean], 1), scalars)
        return quantiles
