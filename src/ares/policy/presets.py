"""Presets: a named choice of prefill, dispatch, admission, rebalance and copies, each with its settings."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ares.policy.admission import ADMISSIONS, Admission, ForecastSettings, admission_policy
from ares.policy.copies import COPIERS, Copies, copier
from ares.policy.dispatch import DISPATCHERS, Dispatch, dispatcher
from ares.policy.dispatch.forecast import ForecastDispatchSettings
from ares.policy.dispatch.least_loaded import LeastLoadedSettings
from ares.policy.prefill import PREFILLS, Prefill, prefill_policy
from ares.policy.rebalance import REBALANCERS, Rebalance, rebalancer
from ares.policy.registering import REGISTRIES


@dataclass(frozen=True, slots=True)
class Preset:
    """One complete policy.

    Attributes
    ----------
    prefill, dispatch, admission, rebalance, copies
        Names of registered policies: where a prompt is computed (policy/prefill), the first decode instance
        (policy/dispatch), when a request may enter decode (policy/admission), which running ones move
        (policy/rebalance), and which get a warm copy elsewhere (policy/copies).
    prefill_settings, dispatch_settings, admission_settings, rebalance_settings, copies_settings
        Their settings, each of the policy's own class; by default that class's defaults.
    knows_lengths
        Whether the simulator gives it the true lengths; for comparison only, since no live service can know them.
    """

    dispatch: str = "least_loaded"
    admission: str = "open"
    rebalance: str = "none"
    dispatch_settings: Any = None
    admission_settings: Any = None
    rebalance_settings: Any = None
    knows_lengths: bool = False
    prefill: str = "fewest_requests"
    prefill_settings: Any = None
    copies: str = "most_saved"
    copies_settings: Any = None

    def __post_init__(self) -> None:
        for part, registry in REGISTRIES.items():
            policy = registry.find(getattr(self, part))
            if getattr(self, f"{part}_settings") is None:
                object.__setattr__(self, f"{part}_settings", policy.Settings())

    @property
    def predicts(self) -> bool:
        """Whether predictions are used where there are any."""
        return any(
            registry[getattr(self, part)].uses_predictions(getattr(self, f"{part}_settings"))
            for part, registry in REGISTRIES.items()
        )

    @property
    def needs_predictions(self) -> str | None:
        """The part that cannot work without predictions, with its name; None: there is none."""
        names = ((part, getattr(self, part)) for part, registry in REGISTRIES.items()
                 if registry[getattr(self, part)].needs_predictions)  # fmt: skip
        return next((f"{part} {name}" for part, name in names), None)

    @property
    def moves(self) -> bool:
        """Whether running requests are moved."""
        return REBALANCERS[self.rebalance].moves

    @property
    def queues_requests(self) -> bool:
        """Whether requests wait in the gateway's queue until they are admitted to decode."""
        return ADMISSIONS[self.admission].queues_requests

    @property
    def sees_requests(self) -> bool:
        """Whether admission or dispatch looks at each running request, not only at the load of instances."""
        return self.queues_requests or DISPATCHERS[self.dispatch].sees_requests

    @property
    def avoids_oom(self) -> bool:
        """Whether requests leave an instance before it runs out of memory (oom_avoidance.py)."""
        return ADMISSIONS[self.admission].avoids_oom(self.admission_settings)

    @property
    def preempts_largest(self) -> bool:
        """Whether instances preempt the largest predicted memory-time, instead of the newest."""
        return ADMISSIONS[self.admission].preempts_largest(self.admission_settings)

    @property
    def sees_prefixes(self) -> bool:
        """Whether it matters where prompts are cached."""
        return (
            PREFILLS[self.prefill].sees_prefixes
            or DISPATCHERS[self.dispatch].sees_prefixes(self.dispatch_settings)
            or ADMISSIONS[self.admission].sees_prefixes(self.admission_settings)
        )

    @property
    def copies_requests(self) -> bool:
        """Whether running requests get warm copies."""
        return COPIERS[self.copies].copies(self.copies_settings)

    @property
    def cooldown_s(self) -> float:
        """Seconds during which a request that was moved is not moved again; 0 where the policy has no such setting."""
        return float(getattr(self.rebalance_settings, "cooldown_s", 0.0))

    def make(self) -> tuple[Dispatch, Admission, Rebalance, Prefill, Copies]:
        """Make its policies, ready to decide; DecisionError where one cannot be."""
        return (
            dispatcher(self.dispatch, self.dispatch_settings),
            admission_policy(self.admission, self.admission_settings),
            rebalancer(self.rebalance, self.rebalance_settings),
            prefill_policy(self.prefill, self.prefill_settings),
            copier(self.copies, self.copies_settings),
        )

    def for_objectives(self, ttft_s: float) -> "Preset":
        """Return this preset with the settings that depend on the objective of the first token, in seconds."""
        changed = {}
        for part in REGISTRIES:
            settings = getattr(self, f"{part}_settings")
            if hasattr(settings, "for_objectives"):
                changed[f"{part}_settings"] = settings.for_objectives(ttft_s)
        return replace(self, **changed)

    def altered(
        self,
        dispatch: str | None = None,
        admission: str | None = None,
        rebalance: str | None = None,
        prefill: str | None = None,
    ) -> "Preset":
        """Return this preset with some of its parts replaced; a part of another name has its default settings.

        Raises
        ------
        ValueError
            A part is not known, or two of them do not go together: one would change nothing.
        """
        changed: dict[str, Any] = {}
        for part, given in (
            ("prefill", prefill),
            ("dispatch", dispatch),
            ("admission", admission),
            ("rebalance", rebalance),
        ):
            if given is None:
                continue
            if given in _REPLACED:
                raise ValueError(f"policy {given!r} is now a preset: give --preset {_REPLACED[given]}")
            if given not in REGISTRIES[part]:
                raise ValueError(f"unknown policy {given!r}; known: {', '.join(REGISTRIES[part])}")
            if given != getattr(self, part):
                changed |= {part: given, f"{part}_settings": None}
        made = replace(self, **changed)
        check_parts(made)
        return made


# Former names of parts that are presets now.
_REPLACED = {"oracle": "ares-oracle"}


def check_parts(made: Preset) -> None:
    """Raise ValueError, with the combinations that work, where a part has no effect with the others."""
    admission = ADMISSIONS[made.admission]
    if admission.queues_requests and made.dispatch != admission.dispatch:
        others = ", ".join(name for name, one in ADMISSIONS.items() if not one.queues_requests)
        raise ValueError(
            f"admission {made.admission} needs dispatch {admission.dispatch} (not {made.dispatch}): it chooses the "
            f"instance itself; every dispatch goes with admission {others}"
        )
    if made.knows_lengths and not made.predicts:
        raise ValueError("it knows the true lengths, which needs a part that uses predictions")
    if admission.queues_requests and admission.dispatch not in DISPATCHERS:
        raise ValueError(f"admission {made.admission} needs dispatch {admission.dispatch}, which is not registered")


def policies(presets: Iterable[Preset]) -> set[type]:
    """Return the classes of the policies that presets use."""
    return {registry[getattr(preset, part)] for preset in presets for part, registry in REGISTRIES.items()}


_SUSPENDING = ForecastSettings(suspends=True)

PRESETS: dict[str, Preset] = {
    # A plain prefill-decode router; commanded moves still work.
    "off": Preset(dispatch="round_robin"),
    "static-rr": Preset(dispatch="round_robin"),
    "static-least-loaded": Preset(dispatch="least_loaded"),
    # As in routers by prefix (policy/prefill/longest_prefix.py), everything else as in `static-least-loaded`.
    "static-prefix": Preset(prefill="longest_prefix"),
    # The paper's rescheduler without its predictor: current load only.
    "ares-no-prediction": Preset(rebalance="current_load"),
    # The paper's system: point predictions, tokens as load, rebalancing alone.
    "paper": Preset(rebalance="paper"),
    # Published rules, everything else as in `static-least-loaded`; their files list what is left out.
    "llumnix": Preset(rebalance="llumnix"),
    "balanceroute": Preset(dispatch="balanceroute"),
    "pausing": Preset(admission="pausing"),
    "past-future": Preset(admission="past-future"),
    # Parts of ours, for the ablation.
    "ares-admission": Preset(dispatch="forecast", admission="forecast"),
    "ares-suspension": Preset(dispatch="forecast", admission="forecast", admission_settings=_SUSPENDING),
    "ares-rebalance": Preset(rebalance="ares"),
    "ares": Preset(dispatch="forecast", admission="forecast", rebalance="ares", admission_settings=_SUSPENDING),
    # Prompts are computed where that takes the least time, by what is cached and queued.
    "least-time": Preset(prefill="least_time", dispatch_settings=LeastLoadedSettings(cached_weight=1.0)),
    # `ares`, and with that; what a decode instance has cached counts.
    "ares-prefix": Preset(
        prefill="least_time",
        dispatch="forecast",
        admission="forecast",
        rebalance="ares",
        dispatch_settings=ForecastDispatchSettings(cached_weight=1.0),
        admission_settings=replace(_SUSPENDING, cached_weight=1.0),
    ),
    "ares-oracle": Preset(
        dispatch="forecast", admission="forecast", rebalance="ares", admission_settings=_SUSPENDING, knows_lengths=True
    ),
}


def preset(name: str) -> Preset:
    """Return the preset called `name`; ValueError lists the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}, or a file that ends in .yaml")
    return PRESETS[name]
