"""The two networks: ours, a distribution of the remaining length, and the paper's, one number."""

import itertools
from typing import Any, Protocol

import torch
from torch import nn

from ares.predictor import hazard
from ares.predictor.features import SCALARS

# The paper's widths between the state and its one output.
_PAPER = (2048, 512, 64)
_INNER_DROPOUT = 0.3
_POSITION = 12  # the leading scalars are knots of the position
# Logits are divided by this among the inputs, which then are about as large as each other.
LOGIT_SCALE = 4.0


class Network(Protocol):
    """What training, evaluation and the worker need of a network."""

    first: "HazardNetwork | None"

    def quantiles(self, states: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return [batch, levels] remaining tokens for features as `features.of_pairs` makes them."""
        ...

    def loss(
        self, states: torch.Tensor, scalars: torch.Tensor, remaining: torch.Tensor, censored: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean training loss of a batch."""
        ...

    def fused(self) -> Any:
        """Return a module with the same `quantiles` in fewer operations, for inference alone."""
        ...


class HazardMember(nn.Module):  # type: ignore[misc] # torch is not type-checked here
    """Hazards from what is known without this state, shifted by a term of the states.

    Without it the position is known (a residual-life curve), and with `forecast` the forecast from the request's first
    state, as logits of the hazards that it leaves at this position.
    """

    def __init__(self, hidden_size: int, bins: int, width: int, *, forecast: bool = False) -> None:
        super().__init__()
        known = bins if forecast else 0
        self.base = nn.Linear(_POSITION + known, bins)
        self.newest = nn.Linear(hidden_size, width)
        self.mean = nn.Linear(hidden_size, width, bias=False)
        self.scalars = nn.Linear(SCALARS + known, width, bias=False)
        self.middle = nn.Linear(width, width)
        self.shift = nn.Linear(width, bins)
        self.drop_state = nn.Dropout(0.0)
        self.drop = nn.Dropout(0.0)
        # At first the states change nothing.
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)
        nn.init.zeros_(self.base.weight)
        nn.init.constant_(self.base.bias, 0.0 if forecast else -3.0)
        if forecast:
            with torch.no_grad():
                self.base.weight[:, _POSITION:] = torch.eye(bins) * LOGIT_SCALE

    def forward(self, states: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return [batch, bins] logits of the hazards."""
        newest, mean = self.drop_state(states).chunk(2, dim=1)
        inner = torch.nn.functional.gelu(self.newest(newest) + self.mean(mean) + self.scalars(scalars))
        inner = torch.nn.functional.gelu(self.middle(self.drop(inner)))
        shift: torch.Tensor = self.shift(self.drop(inner))
        return self.base(_known(scalars)) + shift


def _known(scalars: torch.Tensor) -> torch.Tensor:
    """Return what the hazards start from: the position, and the forecast from the first state where there is one."""
    return torch.cat([scalars[:, :_POSITION], scalars[:, SCALARS:]], 1)


class HazardNetwork(nn.Module):  # type: ignore[misc] # likewise
    """Several members whose distributions are averaged.

    Parameters
    ----------
    first
        Members of a second network, which forecasts from a request's first state (first_forecast.py); 0: there is none.
    """

    def __init__(
        self, hidden_size: int, limit: int, *, members: int = 4, width: int = 64, bins: int = 32, first: int = 0
    ) -> None:
        super().__init__()
        self.register_buffer("grid", hazard.edges(limit, bins))
        self.register_buffer("levels", torch.tensor(hazard.LEVELS))
        count = len(self.grid) - 1
        self.members = nn.ModuleList(
            HazardMember(hidden_size, count, width, forecast=first > 0) for _ in range(members)
        )
        self.first = HazardNetwork(hidden_size, limit, members=first, width=width, bins=bins) if first else None

    def set_dropout(self, share: float) -> None:
        """Hide this share of each state, and at most _INNER_DROPOUT of what is inside, from every training step."""
        for member in self.members:
            member.drop_state.p, member.drop.p = share, min(share, _INNER_DROPOUT)

    def distribution(self, states: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return [batch, bins + 1], the mean over the members of the chance to have ended before each edge."""
        return torch.stack([hazard.cumulative(member(states, scalars)) for member in self.members]).mean(0)

    def quantiles(self, states: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return [batch, levels] of the mean distribution; at `levels` once calibrated, it covers `hazard.LEVELS`."""
        return hazard.quantiles(self.distribution(states, scalars), self.grid, self.levels)

    def loss(
        self, states: torch.Tensor, scalars: torch.Tensor, remaining: torch.Tensor, censored: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean negative log likelihood; the members learn apart from each other."""
        parts = [hazard.log_likelihood(m(states, scalars), self.grid, remaining, censored) for m in self.members]
        return -torch.stack(parts).mean()

    def fused(self) -> "FusedHazardNetwork":
        """Return the same distribution as one network, for inference alone."""
        return FusedHazardNetwork(self)


class FusedHazardNetwork(nn.Module):  # type: ignore[misc] # likewise
    """All members of a trained HazardNetwork in one: the number of operations costs more than their arithmetic."""

    def __init__(self, network: HazardNetwork) -> None:
        super().__init__()
        members = list(network.members)
        shift = torch.block_diag(*(m.shift.weight for m in members))
        made = {
            "grid": network.grid,
            "levels": network.levels,
            "inner": torch.cat([torch.cat([m.newest.weight, m.mean.weight, m.scalars.weight], 1) for m in members]),
            "inner_bias": torch.cat([m.newest.bias for m in members]),
            "middle": torch.block_diag(*(m.middle.weight for m in members)),
            "middle_bias": torch.cat([m.middle.bias for m in members]),
            "last": torch.cat([shift, torch.cat([m.base.weight for m in members])], 1),
            "last_bias": torch.cat([m.shift.bias + m.base.bias for m in members]),
        }
        for name, tensor in made.items():
            self.register_buffer(name, tensor.detach().clone())
        self.first = None if network.first is None else FusedHazardNetwork(network.first)

    def distribution(self, states: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return the distribution of the network."""
        linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
        inner = gelu(linear(torch.cat([states, scalars], 1), self.inner, self.inner_bias))
        inner = gelu(linear(inner, self.middle, self.middle_bias))
        logits = linear(torch.cat([inner, _known(scalars)], 1), self.last, self.last_bias)
        bins = len(self.grid) - 1
        return hazard.cumulative(logits.view(-1, bins)).view(len(states), -1, bins + 1).mean(1)

    def quantiles(self, states: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return the quantiles of the network."""
        return hazard.quantiles(self.distribution(states, scalars), self.grid, self.levels)


class PaperNetwork(nn.Module):  # type: ignore[misc] # likewise
    """The paper's network: d -> 2048 -> 512 -> 64 -> 1 on the newest state, L1 on the raw length.

    ReLU and standardised inputs are ours: the paper gives neither. So is the spread around the estimate: the errors on
    the validation set (`spread`), so that it can be compared as a distribution.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.first = None
        widths = (hidden_size, *_PAPER)
        layers: list[Any] = []
        for left, right in itertools.pairwise(widths):
            layers += [nn.Linear(left, right), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.register_buffer("spread", torch.zeros(len(hazard.LEVELS)))
        # Lengths are hundreds of tokens and a fresh network's output is near zero: learn in units of this.
        self.register_buffer("unit", torch.tensor(100.0))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [batch] remaining tokens."""
        newest = states[:, : states.shape[1] // 2]
        return self.layers(newest)[:, 0] * self.unit

    def quantiles(self, states: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return [batch, levels]: the estimate and the errors seen around it."""
        del scalars
        return (self(states)[:, None] + self.spread).clamp(min=0.5)

    def loss(
        self, states: torch.Tensor, scalars: torch.Tensor, remaining: torch.Tensor, censored: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean absolute error; an output cut by the limit counts as ended there."""
        del scalars, censored
        return (self(states) - remaining.float()).abs().mean()

    def fused(self) -> "PaperNetwork":
        """Return itself: there is nothing to fuse."""
        return self


def parameters(network: nn.Module) -> int:
    """Return how many numbers a network has learned."""
    return sum(p.numel() for p in network.parameters())
