"""Recorded runs, simulated from their arrivals, lengths and fitted cost models, and compared figure by figure.

Each run is simulated with the settings that its gateway decided with. A seed draws everything random: errors of
predictions, the uncertainty of the cost models (the requests of the run, resampled), their residuals of first tokens
and of streams (resampled), and the phase of the rebalancer's period. The result of the simulator is the mean over
seeds, and the interval that holds 95 % of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.bench.live.cost_models import CostModels, Observations, with_move_time
from ares.bench.live.observed_errors import observed_errors
from ares.bench.live.saved import Instance, SavedRun
from ares.policy import Preset
from ares.policy.registering import REGISTRIES
from ares.simulator.cluster import Outcome, Simulation
from ares.simulator.error_model_files import error_model
from ares.simulator.error_models import ErrorModel
from ares.simulator.profile import Profile, StepTimeModel
from ares.traces import Workload

FloatArray = NDArray[np.float64]

SEEDS = 20
TIMES = ("ttft_s", "tpot_s", "e2e_s", "longest_gap_s")
COUNTS = ("moves", "suspensions", "preemptions")
# Largest relative error of each figure; None: the measured one must lie in the interval over seeds.
BOUNDS: Mapping[str, float | None] = {"mean": 0.02, "p50": 0.05, "p99": None}
COUNT_BOUND = 0.2
_INTERVAL = (2.5, 97.5)
# As in the gateway (gateway/control/snapshot.py): times a step at full memory, where TPOT has no objective.
_RELATIVE_TPOT = 1.5
_USUAL_SEQUENCES, _USUAL_BATCH = 256, 2048


@dataclass(frozen=True, slots=True)
class Figures:
    """The compared figures: seconds of each request, by name, shape (R,); and counts of events, by name."""

    times: dict[str, FloatArray]
    counts: dict[str, int]


def measured(run: SavedRun) -> Figures:
    """Return the figures that the clients of a run saw."""
    every = [np.array(request.times_s) for request in run.requests]
    at = np.array([request.at_s for request in run.requests])
    first, last = (np.array([times[end] for times in every]) for end in (0, -1))
    tokens = np.array([len(times) for times in every])
    gaps = np.array([np.diff(times).max(initial=0.0) for times in every])
    moves = sum(move.outcome == "moved" for move in run.moves)
    return _figures(
        first - at,
        (last - first) / np.maximum(tokens - 1, 1),
        last - at,
        gaps,
        tokens,
        {"moves": moves, "suspensions": run.suspensions, "preemptions": run.preemptions},
    )


def _figures(
    ttft: FloatArray, tpot: FloatArray, e2e: FloatArray, gaps: FloatArray, tokens: NDArray[Any], counts: dict[str, int]
) -> Figures:
    several = tokens > 1
    times = {"ttft_s": ttft, "tpot_s": tpot[several], "e2e_s": e2e, "longest_gap_s": gaps[several]}
    return Figures(times, counts)


def preset_in_force(settings: Mapping[str, Any]) -> Preset:
    """Return the preset that a gateway decided with, from the `settings` of its status.

    Raises
    ------
    ValueError
        This version does not know a part of it.
    """
    try:
        given = dict(settings["preset"])
        for part, registry in REGISTRIES.items():
            own = dict(given[f"{part}_settings"])
            if "cooldown_s" in own:
                own["cooldown_s"] = settings["cooldown_s"]
            given[f"{part}_settings"] = registry.find(given[part]).Settings(**own)
        return Preset(**given).for_objectives(settings["slo_ttft_s"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"settings of the run: {error!r}: recorded by another version") from None


def predictor_of(run: SavedRun, given: str | None) -> ErrorModel:
    """Return the predictor of a run: the gateway's own estimate, or an error model fitted to its engines' predictions.

    Raises
    ------
    ValueError
        `given`, which replaces the fitted error model, cannot be read, or there were no predictions.
    """
    if not run.predicted:
        if given is not None:
            raise ValueError(f"--predictor {given}: the engines of this run predicted nothing")
        # A gateway that did not name it had residual life.
        return error_model(run.settings.get("lengths", "residual-life"))
    return observed_errors(run) if given is None else error_model(given)


def _profile(row: Instance, step: Sequence[float], base_s: float, models: CostModels, move_s: float) -> Profile:
    return Profile(
        name=row.name,
        model="recorded",
        source="fitted to the run",
        kv_tokens=row.capacity_tokens,
        kv_bytes_per_token=1,
        block_size=row.block_size,
        max_num_seqs=row.max_num_seqs or _USUAL_SEQUENCES,
        max_num_batched_tokens=row.max_num_batched_tokens or _USUAL_BATCH,
        step=StepTimeModel(
            base_s=base_s,
            per_request_s=step[1],
            per_resident_token_s=step[2],
            per_prefill_token_s=models.prefill_token_s,
        ),
        bandwidth_bytes_s=1e12,  # the whole time of a transfer is in its latency, whatever its size
        latency_s=models.hand_over_s,
        stall_s=move_s,
    )


class Simulated:
    """A run, ready to be simulated with any seed.

    Parameters
    ----------
    run
        The run.
    predictor
        Error model instead of the fitted one (`predictor_of`).
    others
        Cost models of runs over the same engines: they give the time of a move where this run has none.

    Raises
    ------
    ValueError
        The run cannot be simulated; the message says why.
    """

    def __init__(self, run: SavedRun, predictor: str | None, others: Sequence[CostModels] = ()) -> None:
        self.run = run
        self.seen = Observations(run)
        self.models = self.seen.fit()
        self.spread = self.seen.spread(self.models)
        self._others = others
        self.error = predictor_of(run, predictor)
        self.preset = preset_in_force(run.settings)
        self._prefill = [row for row in run.instances if row.role == "prefill"]
        self._decode = [row for row in run.instances if row.role != "prefill"]
        tokens = np.array([len(request.ticks) for request in run.requests], np.int64)
        self._work = Workload(
            run.preset,
            np.array([request.at_s for request in run.requests]),
            np.array([request.prompt_tokens for request in run.requests], np.int64),
            tokens,
        )

    def once(self, seed: int) -> Figures:
        """Simulate the run; seed 0 has the models as they were fitted, the others draw theirs."""
        generator = np.random.default_rng(seed)
        models = with_move_time(
            self.models if seed == 0 else self.seen.resampled(generator), [self.models, *self._others]
        )
        late, base_s = _lateness(models, generator, len(self._work))
        period = float(self.run.settings["period_s"])
        phase = float(generator.uniform(0.0, period))
        begin = self._work.arrival_s + late + phase
        order = np.argsort(begin, kind="stable")
        work = Workload(self.run.preset, begin[order], self._work.prompt_tokens[order], self._work.output_tokens[order])
        outcome = self._simulation(work, models, base_s, period, seed).run()
        return self._read(outcome, order, phase, generator)

    def _simulation(self, work: Workload, models: CostModels, base_s: float, period: float, seed: int) -> Simulation:
        move_s = models.hand_over_s if models.move_s is None else models.move_s
        decode = [
            _profile(row, step, float(step[0]), models, move_s)
            for row, step in zip(self._decode, models.steps, strict=True)
        ]
        prefill = [_profile(row, (0.0, 0.0, 0.0), base_s, models, move_s) for row in self._prefill]
        settings, tpot_s = self.run.settings, self.run.settings["slo_tpot_s"]
        if tpot_s is None:
            capacity = np.array([row.capacity_tokens for row in self._decode])
            tpot_s = _RELATIVE_TPOT * float((models.steps[:, 0] + models.steps[:, 2] * capacity).max())
        return Simulation(
            work,
            decode,
            prefill,
            self.preset,
            self.run.preset,
            self.error,
            period_s=period,
            seed=seed,
            ttft_s=settings["slo_ttft_s"],
            tpot_s=tpot_s,
            gap_s=math.inf if settings["slo_gap_s"] is None else settings["slo_gap_s"],
            first_at_prefill=True,
            limit_tokens=self.run.limit_tokens,
            ended_before=self.run.ended_before,
        )

    def _read(
        self, outcome: Outcome, order: NDArray[np.int64], phase: float, generator: np.random.Generator
    ) -> Figures:
        back = np.argsort(order)
        tokens = self._work.output_tokens
        ttft = outcome.first_token_s[back] - (self._work.arrival_s + phase)
        decode = (outcome.finish_s - outcome.first_token_s)[back]
        decode, gaps = self.spread.apply(generator, tokens, decode, outcome.longest_gap_s[back])
        return _figures(
            ttft,
            decode / np.maximum(tokens - 1, 1),
            ttft + decode,
            gaps,
            tokens,
            {
                "moves": outcome.migrations,
                "suspensions": outcome.suspensions,
                "preemptions": outcome.preemptions,
            },
        )


def _lateness(models: CostModels, generator: np.random.Generator, count: int) -> tuple[FloatArray, float]:
    """Draw residuals of the prefill model as time before the prefill: none is negative, and the base is reduced.

    Where the base is too small for that, smaller ones are drawn, so that the mean does not change.
    """
    earliest = max(-float(models.prefill_spread_s.min()), 1e-9)
    share = min(1.0, models.prefill_base_s / (2.0 * earliest))
    late = (models.prefill_spread_s + earliest) * share
    return generator.choice(late, count), max(models.prefill_base_s - float(late.mean()), 1e-6)


_STATISTICS: dict[str, Callable[[FloatArray], float]] = {
    "mean": lambda values: float(values.mean()),
    "p50": lambda values: float(np.percentile(values, 50)),
    "p99": lambda values: float(np.percentile(values, 99)),
}


def compare_figures(real: Sequence[Figures], made: Sequence[Sequence[Figures]]) -> dict[str, Any]:
    """Compare runs, taken together, with their simulations.

    Parameters
    ----------
    real
        The runs.
    made
        For each seed, all of them simulated.

    Returns
    -------
    dict
        For each figure what was measured, what was simulated (the mean over seeds), the relative error, the interval
        over seeds, and whether it is `within` its bound: means 2 %, P50 5 %, P99 within the interval, counts 20 % or
        half an event a run.
    """
    result: dict[str, Any] = {}
    for name in TIMES:
        values = np.concatenate([one.times[name] for one in real])
        seeds = [np.concatenate([one.times[name] for one in each]) for each in made]
        if len(values):
            result[name] = {
                statistic: _entry(read(values), [read(one) for one in seeds], BOUNDS[statistic])
                for statistic, read in _STATISTICS.items()
            }
    for name in COUNTS:
        count = sum(one.counts[name] for one in real)
        totals = [float(sum(one.counts[name] for one in each)) for each in made]
        entry = _entry(float(count), totals, None)
        off = abs(entry["simulated"] - count)
        result[name] = entry | {"within": bool(off <= max(COUNT_BOUND * count, 0.5 * len(real)))}
    return result


def _entry(real: float, seeds: list[float], bound: float | None) -> dict[str, Any]:
    model = float(np.mean(seeds))
    low, high = (float(np.percentile(seeds, q)) for q in _INTERVAL)
    error = model / real - 1.0 if real else None
    within = low <= real <= high if bound is None else error is not None and abs(error) <= bound
    return {
        "measured": real,
        "simulated": model,
        "error": error,
        "low": low,
        "high": high,
        "within": bool(within),
    }


def compare(runs: Sequence[SavedRun], predictor: str | None, seeds: int = SEEDS) -> dict[str, Any]:
    """Simulate runs over the same engines; compare each alone, and those of a preset together.

    Parameters
    ----------
    runs
        The runs.
    predictor
        Where the engines predicted: an error model, or a file of one or of an evaluation, instead of the one that is
        fitted to the predictions of the run.
    seeds
        How often each is simulated.

    Raises
    ------
    ValueError
        One of them cannot be simulated.
    """
    models = [Observations(run).fit() for run in runs]
    entries, together = [], defaultdict(list)
    for run in runs:
        simulated = Simulated(run, predictor, models)
        made = [simulated.once(seed) for seed in range(seeds)]
        real = measured(run)
        together[run.preset].append((real, made))
        entries.append(
            {
                "preset": run.preset,
                "requests": len(run.requests),
                "cost_models": _described(simulated),
                "figures": compare_figures([real], [[one] for one in made]),
            }
        )
    presets = []
    for name, pairs in together.items():
        every = [[made[seed] for _, made in pairs] for seed in range(seeds)]
        presets.append(
            {"preset": name, "runs": len(pairs), "figures": compare_figures([real for real, _ in pairs], every)}
        )
    return {"seeds": seeds, "presets": presets, "runs": entries}


def _described(simulated: Simulated) -> dict[str, Any]:
    models = simulated.models
    return {
        "steps_s": {name: step.tolist() for name, step in zip(simulated.seen.names, models.steps, strict=True)},
        "steps_by_gateway_s": {
            row.name: row.step_time_coefficients for row in simulated.run.instances if row.role != "prefill"
        },
        "prefill_s": {
            "base": models.prefill_base_s,
            "token": models.prefill_token_s,
            "deviation": float(models.prefill_spread_s.std()),
        },
        "hand_over_s": models.hand_over_s,
        "move_s": models.move_s,
        "predictor": asdict(simulated.error) if simulated.preset.predicts else None,
    }
