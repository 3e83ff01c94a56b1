"""The comparison of predictors and the noise floor on the same test prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.predictor import first_forecast, floor, metrics
from ares.predictor.checkpoint import Checkpoint
from ares.predictor.dataset import Pairs
from ares.predictor.errors import PredictorError
from ares.predictor.floor import Prefix
from ares.predictor.metrics import Array
from ares.predictor.networks import parameters
from ares.predictor.training import Data, predict


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One model's predictions for the test pairs: [pairs, levels], bounded by what the limit allows."""

    name: str
    parameters: int
    quantiles: Array


def of_checkpoint(name: str, checkpoint: Checkpoint, pairs: Pairs) -> Evaluated:
    """Predict with a checkpoint; PredictorError where it was not made for these states."""
    source = pairs.source
    checkpoint.check(source.model, source.hidden_size, source.hidden_state)
    data = Data.of(pairs, checkpoint.center, checkpoint.scale, checkpoint.network.first)
    return Evaluated(name, parameters(checkpoint.network), predict(checkpoint.network, data))


def changes_of_instance(checkpoint: Checkpoint, pairs: Pairs, seed: int = 0) -> dict[str, Any]:
    """Return what it costs in accuracy that requests change their instance: `behind_a_prefill`, and `behind_a_move`.

    The errors are those of the pairs after it: of all but the first, and of those after one move of each output. The
    forecast from the first state travels along, and the average of the states does (`carried`), or is lost with the
    source (`restarted`). Empty where there are no such pairs.
    """
    later = first_forecast.starts(pairs) != np.arange(len(pairs))
    changes = {"behind_a_prefill": later, "behind_a_move": pairs.moved(seed)}
    return {name: _behind(checkpoint, pairs, after) if after.any() else {} for name, after in changes.items()}


def _behind(checkpoint: Checkpoint, pairs: Pairs, after: NDArray[np.bool_]) -> dict[str, Any]:
    data = Data.of(pairs, checkpoint.center, checkpoint.scale, checkpoint.network.first)
    remaining = pairs.remaining[after].astype(float)
    whole = metrics.absolute_error(predict(checkpoint.network, data)[after], remaining)
    _, prompts = np.unique(np.array(pairs.prompts)[pairs.output[after]], return_inverse=True)
    bootstrap = metrics.Bootstrap(prompts)
    result: dict[str, Any] = {"pairs": len(remaining), "mae_whole": round(float(whole.mean()), 4)}
    for name, averages in (("carried", True), ("restarted", False)):
        moved = data.moved(pairs, after, checkpoint.center, checkpoint.scale, averages=averages)
        errors = metrics.absolute_error(predict(checkpoint.network, moved), remaining)
        result[name] = {
            "mae": round(float(errors.mean()), 4),
            "mae_above_share": _share(errors - whole, whole),
            "mae_above_share_interval": metrics.interval(bootstrap.means(errors - whole, whole)),
        }
    return result


def report(evaluated: Sequence[Evaluated], test: Pairs, prefixes: Sequence[Prefix] = ()) -> dict[str, Any]:
    """Compare models with the first one, which is ours.

    Parameters
    ----------
    evaluated
        Predictions for `test`, in its order.
    prefixes
        Continuations drawn at some of the test pairs, if any were drawn.

    Returns
    -------
    dict
        ``models``, one entry each; ``differences``, of each model's errors to ours with intervals over prompts;
        ``noise_floor`` and ``reducible_error_removed`` where there are prefixes.
    """
    remaining, room = test.remaining.astype(float), test.room.astype(float)
    _, prompts = np.unique(np.array(test.prompts)[test.output], return_inverse=True)
    everything = metrics.Bootstrap(prompts)
    length = remaining + test.position
    decile = np.searchsorted(np.quantile(length, np.arange(0.1, 0.95, 0.1)), length, side="right")
    at_fraction = metrics.rows_by_position(test.output, test.position.astype(float), remaining)
    models = []
    for model in evaluated:
        entry: dict[str, Any] = {"name": model.name, "parameters": model.parameters}
        entry |= metrics.summary(model.quantiles, remaining, room, everything)
        entry["by_position"] = {
            f"{round(100 * part)}%": _some(model.quantiles, remaining, room, prompts, rows)
            for part, rows in at_fraction.items()
        }
        # How an output ends is not known when predicting, but shows where the error comes from.
        entry["by_end"] = {
            name: _some(model.quantiles, remaining, room, prompts, np.flatnonzero(test.censored == cut))
            for name, cut in (("ended", False), ("cut", True))
            if (test.censored == cut).any()
        }
        entry["by_length_decile"] = [
            {"longest": int(length[decile == n].max())}
            | _some(model.quantiles, remaining, room, prompts, np.flatnonzero(decile == n))
            for n in np.unique(decile)
        ]
        models.append(entry)
    result: dict[str, Any] = {
        "test": {
            "prompts": int(prompts.max()) + 1,
            "pairs": len(test),
            "censored_share_of_pairs": round(float(test.censored.mean()), 4),
            "mean_remaining": round(float(remaining.mean()), 2),
        },
        "models": models,
        "differences": [_difference(model, evaluated[0], remaining, everything) for model in evaluated[1:]],
    }
    if prefixes:
        result |= _against_floor(evaluated, test, prefixes)
    return result


def _some(
    quantiles: Array, remaining: Array, room: Array, prompts: NDArray[np.int64], rows: NDArray[np.int64]
) -> dict[str, Any]:
    whole = metrics.summary(quantiles[rows], remaining[rows], room[rows], metrics.Bootstrap(prompts[rows]))
    names = ("mae", "mae_interval", "relative_mae", "kendall_tau", "crps", "p50_coverage", "p90_coverage")
    return {"pairs": len(rows)} | {name: whole[name] for name in names}


def _difference(model: Evaluated, ours: Evaluated, remaining: Array, bootstrap: metrics.Bootstrap) -> dict[str, Any]:
    mae = [metrics.absolute_error(m.quantiles, remaining) for m in (model, ours)]
    crps = [2 * metrics.pinball(m.quantiles, remaining) for m in (model, ours)]
    below = bootstrap.means(mae[0] - mae[1], mae[0])
    return {
        "baseline": model.name,
        "mae_below": round(float((mae[0] - mae[1]).mean()), 4),
        "mae_below_interval": bootstrap.interval(mae[0] - mae[1]),
        "mae_below_share": _share(mae[0] - mae[1], mae[0]),
        "mae_below_share_interval": metrics.interval(below),
        "crps_below": round(float((crps[0] - crps[1]).mean()), 4),
        "crps_below_interval": bootstrap.interval(crps[0] - crps[1]),
    }


def _share(part: Array, whole: Array) -> float | None:
    """Return the share of one sum in another; None where the latter is zero: a model without any error."""
    return round(float(part.sum() / whole.sum()), 4) if whole.any() else None


def rows_of(prefixes: Sequence[Prefix], test: Pairs) -> NDArray[np.int64]:
    """Return which test pairs continuations were drawn at; PredictorError where one is not among them."""
    where = {(test.requests[o], p): n for n, (o, p) in enumerate(zip(test.output, test.position.tolist(), strict=True))}
    missing = [p.request for p in prefixes if (p.request, p.position) not in where]
    if missing:
        raise PredictorError(f"the noise floor was drawn from other data: {missing[0]} is not in the test set")
    return np.array([where[p.request, p.position] for p in prefixes], np.int64)


def _against_floor(evaluated: Sequence[Evaluated], test: Pairs, prefixes: Sequence[Prefix]) -> dict[str, Any]:
    rows = rows_of(prefixes, test)
    _, prompts = np.unique(np.array(test.prompts)[test.output[rows]], return_inverse=True)
    errors: Mapping[str, Mapping[str, Array]] = {m.name: floor.errors(m.quantiles[rows], prefixes) for m in evaluated}
    own = errors[evaluated[0].name]
    return {
        "noise_floor": floor.summary(prefixes, prompts)
        | {
            "models": {
                name: {metric: round(float(values.mean()), 4) for metric, values in parts.items()}
                for name, parts in errors.items()
            }
        },
        "reducible_error_removed": {
            model.name: floor.reducible(own, errors[model.name], prefixes, prompts) for model in evaluated[1:]
        },
    }
