"""Training: early stopping on the validation prompts, everything from one seed."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ares.predictor import calibration, features, first_forecast, hazard, metrics
from ares.predictor.checkpoint import ARCHITECTURES, Checkpoint, build
from ares.predictor.dataset import Pairs, too_few_prompts
from ares.predictor.errors import PredictorError
from ares.predictor.hazard import LEVELS
from ares.predictor.networks import HazardNetwork, PaperNetwork

_BASE_STEPS = 200
# Parts of the training prompts: forecasts for each come from a network that has learned from the others.
PARTS = 4
_PATIENCE_OF_FIRST = 8


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train."""

    arch: str = "ours"
    seed: int = 0
    epochs: int = 100
    patience: int = 10
    batch: int = 256
    rate: float = 3e-4
    decay: float = 0.05
    members: int = 4
    # Of the network that forecasts from the first state; 0: there is none.
    first: int = 2
    width: int = 64
    # Shares of each state that training hides; the best one on the validation prompts is taken. States have many
    # numbers: where prompts are few, or say little of their lengths, a network that sees all of them learns by heart.
    dropouts: tuple[float, ...] = (0.5, 0.2, 0.0)
    calibrate: bool = True
    # Share of the outputs that are also trained on as if moved: their history is lost on the way.
    moved: float = 0.3


def settings_of(arch: str, seed: int = 0, **given: Any) -> TrainingSettings:
    """Return the settings of an architecture; what is given as None is left at its default.

    Raises
    ------
    PredictorError
        There is no such architecture, or a setting has no effect on it.
    """
    if arch not in ARCHITECTURES:
        raise PredictorError(f"unknown architecture {arch!r}: {' or '.join(ARCHITECTURES)}")
    if arch == "paper" and given.get("members") is not None:
        raise PredictorError("--members changes nothing: the paper's predictor is one network; leave it out")
    chosen = {name: value for name, value in given.items() if value is not None}
    if arch == "paper":
        chosen |= {"moved": 0.0, "first": 0}  # it has no history to lose
    return TrainingSettings(arch=arch, seed=seed, **chosen)


@dataclass(frozen=True, slots=True)
class Data:
    """Features and truth of some pairs as tensors."""

    states: torch.Tensor
    scalars: torch.Tensor
    remaining: torch.Tensor
    censored: torch.Tensor
    room: np.ndarray[Any, Any]

    @classmethod
    def of(cls, pairs: Pairs, center: torch.Tensor, scale: torch.Tensor, first: HazardNetwork | None = None) -> "Data":
        """Compute the features of pairs; with `first`, also its forecasts from their outputs' first states."""
        states, scalars = features.of_pairs(pairs, center, scale)
        data = cls(states, scalars, torch.from_numpy(pairs.remaining), torch.from_numpy(pairs.censored), pairs.room)
        return data if first is None else data.with_forecasts(first_forecast.of_pairs(first, data.newest, pairs))

    @property
    def newest(self) -> torch.Tensor:
        """[pairs, d] the state of each pair, standardised."""
        return self.states[:, : self.states.shape[1] // 2]

    def with_forecasts(self, logits: torch.Tensor) -> "Data":
        """Return the same with [pairs, bins] logits of the forecasts from first states."""
        return replace(self, scalars=torch.cat([self.scalars, logits], 1))

    def moved(
        self,
        pairs: Pairs,
        after: np.ndarray[Any, Any],
        center: torch.Tensor,
        scale: torch.Tensor,
        *,
        averages: bool = False,
    ) -> "Data":
        """Return those of these `pairs` that come after a move.

        The forecasts from first states travel along, and with `averages` those of the states, as serving sends them.
        """
        before = None
        if averages:
            # The last pair of each output before its move; `after` has no output's first pair.
            last = np.flatnonzero(after[1:] & ~after[:-1])
            count = torch.from_numpy(last - first_forecast.starts(pairs)[last] + 1)
            mean = self.states[torch.from_numpy(last), self.states.shape[1] // 2 :]
            before = count, features.expand(*features.compact(mean))
        kept = pairs.only(after)
        states, scalars = features.of_pairs(kept, center, scale, before)
        forecasts = self.scalars[torch.from_numpy(after), features.SCALARS :]
        rest = torch.from_numpy(kept.remaining), torch.from_numpy(kept.censored), kept.room
        return Data(states, torch.cat([scalars, forecasts], 1), *rest)

    def as_first(self, pairs: Pairs, rows: np.ndarray[Any, Any]) -> "Data":
        """Return some of these `pairs`, each as if it were the first of its request."""
        position, prompt_length = (torch.from_numpy(a[rows]) for a in (pairs.position, pairs.prompt_length))
        states, scalars = first_forecast.inputs(self.newest[rows], position, prompt_length)
        return Data(states, scalars, self.remaining[rows], self.censored[rows], self.room[rows])

    def only(self, rows: np.ndarray[Any, Any]) -> "Data":
        """Return some of the pairs: a mask."""
        chosen = torch.from_numpy(rows)
        states, scalars, remaining, censored = (
            tensor[chosen] for tensor in (self.states, self.scalars, self.remaining, self.censored)
        )
        return Data(states, scalars, remaining, censored, self.room[rows])

    def joined(self, other: "Data") -> "Data":
        """Return these pairs and others."""
        tensors = ("states", "scalars", "remaining", "censored")
        both = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in tensors}
        return Data(**both, room=np.concatenate([self.room, other.room]))


def train(
    pairs: Pairs, settings: TrainingSettings, on_epoch: Callable[[dict[str, float]], None] = lambda _: None
) -> tuple[Checkpoint, dict[str, Any]]:
    """Train on the training prompts, with early stopping on the validation prompts.

    Returns
    -------
    checkpoint
        The network of the best epoch.
    report
        Settings, the curve (one entry per epoch) and the best epoch.

    Raises
    ------
    PredictorError
        There are too few prompts to train on, or the loss is not finite.
    """
    if missing := too_few_prompts(pairs.pair_prompts):
        raise PredictorError(missing)
    torch.manual_seed(settings.seed)
    parts = {name: pairs.only(pairs.split(name)) for name in ("train", "validation")}
    recorded = torch.from_numpy(parts["train"].states).float()
    center, scale = recorded.mean(0), recorded.std(0).clamp(min=1e-3)
    sizes = {f"{name}_pairs": len(part) for name, part in parts.items()}
    data = {name: Data.of(part, center, scale) for name, part in parts.items()}
    options: dict[str, Any] = {}
    if settings.arch == "ours":
        options = {name: getattr(settings, name) for name in ("members", "width", "first")}
        options = {name: value for name, value in options.items() if value} | {"limit": pairs.source.limit}
    network = build(settings.arch, pairs.source.hidden_size, options)
    dropouts = settings.dropouts
    if network.first is not None:
        data, best_dropout = with_forecasts(network.first, parts, data, settings)
        dropouts = (best_dropout,)
    if settings.moved:
        moved = parts["train"].moved(settings.seed, settings.moved)
        data["train"] = data["train"].joined(data["train"].moved(parts["train"], moved, center, scale))
    if isinstance(network, PaperNetwork):
        curve = _fit(network, data, settings, on_epoch)
        _fit_spread(network, data["validation"])
    else:
        curve, _ = _fit_hazards(network, data, settings, dropouts, on_epoch)
        if settings.calibrate:
            _calibrate(network.eval(), data["validation"])
    source = pairs.source
    checkpoint = Checkpoint(
        network=network.eval(),
        arch=settings.arch,
        options=options,
        model=source.model,
        hidden_size=source.hidden_size,
        hidden_state=source.hidden_state,
        every=source.every,
        limit=source.limit,
        center=center,
        scale=scale,
    )
    best = min(curve, key=lambda entry: entry["validation_crps"])
    return checkpoint, {"settings": asdict(settings), **sizes, "best": best, "curve": curve}


def with_forecasts(
    network: HazardNetwork, parts: dict[str, Pairs], data: dict[str, Data], settings: TrainingSettings
) -> tuple[dict[str, Data], float]:
    """Fit the network of first states; return the data with its forecasts, and the best dropout.

    On prompts that it has learned from a network is surer than on others, and what learns from its forecasts would
    trust them too much: those for training prompts come from networks that have learned from other prompts.
    """
    learned = first_forecast.sample(parts["train"], settings.seed)
    validation = data["validation"].as_first(
        parts["validation"], first_forecast.sample(parts["validation"], settings.seed)
    )
    own = data["train"].as_first(parts["train"], learned)
    shorter = replace(settings, patience=min(settings.patience, _PATIENCE_OF_FIRST))

    def fit(fresh: HazardNetwork, chosen: Data, dropouts: tuple[float, ...]) -> float:
        both = {"train": chosen, "validation": validation}
        return _fit_hazards(fresh, both, shorter, dropouts, lambda _: None)[1]

    dropout = fit(network, own, settings.dropouts)
    found = {"validation": first_forecast.of_pairs(network, data["validation"].newest, parts["validation"])}
    found["train"] = torch.zeros(len(parts["train"]), len(network.grid) - 1)
    part_of_all = first_forecast.part_of(parts["train"], PARTS)
    hidden_size = own.states.shape[1] // 2
    for part in range(PARTS):
        options = {"members": 1, "width": settings.width}
        other = HazardNetwork(hidden_size, parts["train"].source.limit, **options)
        fit(other, own.only(part_of_all[learned] != part), (dropout,))
        rows = part_of_all == part
        chosen = torch.from_numpy(rows)
        newest = data["train"].newest[chosen]
        found["train"][chosen] = first_forecast.of_pairs(other, newest, parts["train"].only(rows))
    return {name: data[name].with_forecasts(forecasts) for name, forecasts in found.items()}, dropout


def _fit_hazards(
    network: HazardNetwork,
    data: dict[str, Data],
    settings: TrainingSettings,
    dropouts: tuple[float, ...],
    on_epoch: Callable[[dict[str, float]], None],
) -> tuple[list[dict[str, float]], float]:
    """Fit with each dropout, and keep the best; return its curve and the dropout."""
    if network.first is None:
        _fit_base(network, data["train"])
    fresh, best, found = copy.deepcopy(network.state_dict()), float("inf"), None
    for dropout in dropouts:
        network.load_state_dict(fresh)
        network.set_dropout(dropout)
        curve = _fit(network, data, settings, on_epoch)
        score = min(entry["validation_crps"] for entry in curve)
        if found is None or score < best:
            best, found = score, (curve, dropout, copy.deepcopy(network.state_dict()))
    assert found is not None  # noqa: S101 - for the type checker: there is a dropout
    network.load_state_dict(found[2])
    network.eval()
    return found[0], found[1]


def _fit_base(network: HazardNetwork, data: Data) -> None:
    """Initialise with the residual-life curve: hazards from the position alone, equal for every member."""
    first = network.members[0].base
    optimizer = torch.optim.Adam(first.parameters(), lr=0.05)
    scalars = data.scalars[:, : first.in_features]
    for _ in range(_BASE_STEPS):
        optimizer.zero_grad()
        loss = -hazard.log_likelihood(first(scalars), network.grid, data.remaining, data.censored).mean()
        loss.backward()
        optimizer.step()
    for member in network.members:
        member.base.load_state_dict(first.state_dict())


def _fit(
    network: Any, data: dict[str, Data], settings: TrainingSettings, on_epoch: Callable[[dict[str, float]], None]
) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
    own = data["train"]
    curve: list[dict[str, float]] = []
    best, best_state, waited = float("inf"), None, 0
    for epoch in range(settings.epochs):
        network.train()
        total = 0.0
        order = torch.randperm(len(own.remaining))
        for chosen in order.split(settings.batch):
            optimizer.zero_grad()
            loss = network.loss(own.states[chosen], own.scalars[chosen], own.remaining[chosen], own.censored[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach()) * len(chosen)
        if not np.isfinite(total):
            raise PredictorError(f"training diverged in epoch {epoch}: lower the learning rate")
        quantiles = predict(network.eval(), data["validation"])
        remaining = data["validation"].remaining.numpy().astype(float)
        entry = {
            "epoch": epoch,
            "train_loss": total / len(order),
            "validation_mae": float(metrics.absolute_error(quantiles, remaining).mean()),
            "validation_crps": float(2 * metrics.pinball(quantiles, remaining).mean()),
        }
        curve.append(entry)
        on_epoch(entry)
        # The paper's network predicts one number, so that its score is that number's error.
        score = entry["validation_mae" if isinstance(network, PaperNetwork) else "validation_crps"]
        if score < best:
            best, best_state, waited = score, copy.deepcopy(network.state_dict()), 0
        elif (waited := waited + 1) >= settings.patience:
            break
    if best_state is not None:
        network.load_state_dict(best_state)
    return curve


def _fit_spread(network: PaperNetwork, data: Data) -> None:
    with torch.no_grad():
        errors = data.remaining.float() - network.eval()(data.states)
    spread = torch.quantile(errors, torch.tensor(LEVELS))
    # The estimate stays the median: the spread is around it.
    network.spread.copy_(spread - (spread[9] + spread[10]) / 2)


def _calibrate(network: HazardNetwork, data: Data) -> None:
    with torch.no_grad():
        ended = network.distribution(data.states, data.scalars)
    parts = calibration.transform(ended, network.grid, data.remaining.numpy().astype(float), data.room.astype(float))
    network.levels.copy_(calibration.levels(*parts))


def predict(network: Any, data: Data, batch: int = 4096) -> metrics.Array:
    """Return [pairs, levels], bounded by the tokens that the limit allows."""
    with torch.no_grad():
        parts = [
            network.quantiles(data.states[rows], data.scalars[rows]).numpy().astype(float)
            for rows in torch.arange(len(data.remaining)).split(batch)
        ]
    return metrics.bounded(np.concatenate(parts) if parts else np.zeros((0, len(LEVELS))), data.room.astype(float))
