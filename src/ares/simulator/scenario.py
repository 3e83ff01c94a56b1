"""A scenario: workload, cluster and predictor, resolved from what the command line names."""

from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path

from ares import plugins
from ares.policy import PRESETS, Preset
from ares.policy.preset_files import with_settings
from ares.simulator.classes import SimulatedClass
from ares.simulator.cluster import Outcome, Simulation
from ares.simulator.error_model_files import error_model
from ares.simulator.error_models import ErrorModel
from ares.simulator.metrics import capacity_rps
from ares.simulator.profile import Profile, load_profile
from ares.traces import WORKLOADS, Workload, read_trace, synthetic


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything about a run but its preset, load and seed; plain values, so that it can be sent to other processes."""

    trace: str
    """A synthetic workload's name or a file."""
    trace_format: str | None
    requests: int | None
    """How many requests: drawn (2,000 by default), or the first of a file, repeated if it holds fewer."""
    prefill: int
    decode: int
    profile: str
    prefill_profile: str | None
    predictor: str
    period_s: float
    admission: str | None = None
    dispatch: str | None = None
    rebalance: str | None = None
    slo_ttft: float = 20.0
    slo_tpot: float = 0.03
    slo_gap: float = inf
    time_unit: str | None = None
    classes: tuple[tuple[str, SimulatedClass], ...] = ()
    """Classes of service by name."""
    policies: tuple[str, ...] = ()
    """Files with policies of the user's own."""
    settings: tuple[str, ...] = ()
    """Settings of the presets that replace their own, such as `rebalance.theta=0.2`."""
    prefix_caching: bool = False
    """Whether instances have prefix caches."""
    recorded: Workload | None = None
    """The workload of the trace file once it has been read: a pipe can be read only once."""

    def read(self) -> "Scenario":
        """Return the scenario with its trace file read, if it has one; TraceError where it cannot be."""
        if self.trace in WORKLOADS:
            return self
        return replace(self, recorded=self._recorded())

    def _recorded(self) -> Workload:
        return read_trace(Path(self.trace), self.trace_format, self.time_unit, with_blocks=self.prefix_caching)

    def workload(self, seed: int) -> Workload:
        """Draw the requests or take those of the file; the seed matters to synthetic ones only."""
        if self.trace in WORKLOADS:
            return synthetic(self.trace, self.requests or 2000, seed)
        work = self.recorded or self._recorded()
        return work.repeated(self.requests) if self.requests else work

    def policy(self, name: str) -> Preset:
        """Return a preset with the parts that the scenario replaces; ValueError where parts cannot be combined."""
        try:
            plugins.load(self.policies)  # in each process of a sweep
            chosen = plugins.preset(name).altered(self.dispatch, self.admission, self.rebalance)
            chosen = with_settings(chosen, self.settings)
            if chosen.sees_prefixes and not self.prefix_caching:
                raise ValueError(
                    f"prefill {chosen.prefill} with dispatch {chosen.dispatch} looks at what is cached, which needs "
                    "prefix caches: ares simulate --prefix-caching, with a trace that names blocks"
                )
            if chosen.copies_requests:
                raise ValueError(
                    f"copies {chosen.copies} needs what is not simulated, warm copies: leave "
                    "copies out, or set copies.link_bytes_s=0"
                )
            return chosen
        except ValueError as error:
            raise ValueError(f"preset {name}: {error}" if name in PRESETS else str(error)) from None

    def profiles(self) -> tuple[list[Profile], list[Profile]]:
        """Return a profile for each decode and each prefill instance."""
        if self.decode < 1 or self.prefill < 0:
            raise ValueError(f"--decode must be at least 1 and --prefill at least 0, not {self.decode}, {self.prefill}")
        decode = load_profile(self.profile)
        prefill = load_profile(self.prefill_profile or self.profile)
        return [decode] * self.decode, [prefill] * self.prefill

    def error(self) -> ErrorModel:
        """Return the predictor's error model."""
        return error_model(self.predictor)

    def simulation(
        self, name: str, load: float | None, rate_scale: float | None, seed: int
    ) -> tuple[Simulation, float]:
        """Make a run; return it and its load (1 is the capacity of the cluster)."""
        chosen = self.policy(name)
        if (part := chosen.needs_predictions) and not (chosen.knows_lengths or self.error().predicts):
            raise ValueError(
                f"preset {name} has {part}, which needs predictions: --predictor {self.predictor} has none; "
                "residual-life is what the live service uses for a model without a trained predictor"
            )
        work = self.workload(seed)
        decode, prefill = self.profiles()
        capacity = capacity_rps(work, decode, prefill)
        if len(work) > 1 and not isfinite(work.rate) and (load is not None or rate_scale != 1.0):
            raise ValueError(f"{self.trace}: all requests arrive at once, so that there is no rate to change")
        if load is not None:
            work = work.at_rate(load * capacity)
        elif rate_scale is not None:
            work = work.at_rate(work.rate * rate_scale)
        simulation = Simulation(work, decode, prefill, chosen, name, self.error(), self.period_s, seed)
        simulation.ttft_s, simulation.tpot_s = self.slo_ttft, self.slo_tpot
        simulation.prefix_caching = self.prefix_caching
        simulation.gap_s, simulation.classes = self.slo_gap, dict(self.classes)
        return simulation, work.rate / capacity


def run(
    scenario: Scenario, name: str, load: float | None, rate_scale: float | None, seed: int
) -> tuple[Outcome, float]:
    """Run one preset at one load with one seed."""
    simulation, actual = scenario.simulation(name, load, rate_scale, seed)
    return simulation.run(), actual


def described(scenario: Scenario, seed: int | None) -> dict[str, object]:
    """Describe a scenario for a result file; of a trace file only the name, which means something elsewhere."""
    plain = replace(scenario, recorded=None)
    fields: dict[str, object] = {name: value for name, value in asdict(plain).items() if value not in (None, ())}
    fields["trace"] = Path(scenario.trace).name
    if not isfinite(scenario.slo_gap):
        del fields["slo_gap"]
    if scenario.classes:
        fields["classes"] = {name: one.model_dump(exclude_none=True) for name, one in scenario.classes}
    if scenario.policies:
        fields["policies"] = [Path(file).name for file in scenario.policies]
    fields["profile"] = Path(scenario.profile).stem
    if seed is not None:
        fields["seed"] = seed
    return fields
