"""Inference for running requests: what the decode worker runs, and what evaluation times."""

import torch

from ares.predictor import features
from ares.predictor.checkpoint import Checkpoint
from ares.predictor.features import History


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

    def forget(self, slots: list[int]) -> None:
        """Empty slots for other requests."""
        self._history.clear(slots)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def predict(
        self, slots: torch.Tensor, states: torch.Tensor, position: torch.Tensor, prompt_length: torch.Tensor
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

        Returns
        -------
        torch.Tensor
            [batch, levels] float32 remaining tokens at `hazard.LEVELS`, the request's own limit not yet applied.
        """
        standard = features.standardised(states, self._center, self._scale)
        mean, similarity = self._history.update(slots, standard)
        scalars = features.scalars(position, prompt_length, similarity)
        quantiles: torch.Tensor = self._network.quantiles(torch.cat([standard, mean], 1), scalars)
        return quantiles
