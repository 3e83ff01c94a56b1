"""Presets: a named choice of dispatch, admission, queue order and rebalance."""

from dataclasses import dataclass, field, replace
from typing import Any

from ares.policy.admission import ADMISSIONS, QUEUES, AdmissionSettings, SuspendSettings
from ares.policy.placement import DISPATCHERS
from ares.policy.rebalance import REBALANCERS, Rebalance, rebalancer


@dataclass(frozen=True, slots=True)
class Preset:
    """One complete policy.

    Attributes
    ----------
    dispatch
        First placement: round_robin, least_loaded, or forecast.
    rebalance
        Name of a registered policy (policy/rebalance).
    settings
        Its settings, of its own class; by default that class's defaults.
    admission
        open: straight to the instance; forecast: held until the predicted peak of memory fits.
    queue
        fcfs, or volume: smallest predicted memory-time first, the largest gives way.
    suspends
        Whether a long request with time to spare gives way to one that waits; needs admission by forecast.
    predicts
        Whether predictions are used where there are any.
    knows_lengths
        Whether the simulator tells it the true lengths; a preset for comparison, which no live service can have.
    admission_settings
        Knobs of admission and queue order.
    suspend_settings
        Knobs of suspension.
    """

    dispatch: str
    rebalance: str
    settings: Any = None
    admission: str = "open"
    queue: str = "fcfs"
    suspends: bool = False
    predicts: bool = False
    knows_lengths: bool = False
    admission_settings: AdmissionSettings = field(default_factory=AdmissionSettings)
    suspend_settings: SuspendSettings = field(default_factory=SuspendSettings)

    def __post_init__(self) -> None:
        policy = REBALANCERS.find(self.rebalance)
        if self.settings is None:
            object.__setattr__(self, "settings", policy.Settings())

    @property
    def moves(self) -> bool:
        """Whether running requests are moved."""
        return REBALANCERS[self.rebalance].moves

    @property
    def cooldown_s(self) -> float:
        """Seconds during which a request that was moved is not moved again; 0 where the policy has no such setting."""
        return float(getattr(self.settings, "cooldown_s", 0.0))

    def rebalancer(self) -> Rebalance:
        """Make the rebalance policy, ready to decide."""
        return rebalancer(self.rebalance, self.settings)

    def altered(
        self,
        dispatch: str | None = None,
        admission: str | None = None,
        rebalance: str | None = None,
        queue: str | None = None,
    ) -> "Preset":
        """Return this preset with some of its parts replaced; it uses predictions where a part needs them.

        Raises
        ------
        ValueError
            A part is not known, or two of them do not go together: one would change nothing.
        """
        for given, known in (
            (dispatch, tuple(DISPATCHERS)),
            (admission, ADMISSIONS),
            (rebalance, tuple(REBALANCERS)),
            (queue, QUEUES),
        ):
            if given is not None and given in _REPLACED:
                raise ValueError(f"policy {given!r} is now a preset: give --preset {_REPLACED[given]}")
            if given is not None and given not in known:
                raise ValueError(f"unknown policy {given!r}; known: {', '.join(known)}")
        changed = replace(
            self,
            dispatch=dispatch or self.dispatch,
            admission=admission or self.admission,
            rebalance=rebalance or self.rebalance,
            settings=self.settings if rebalance in (None, self.rebalance) else None,
            queue=queue or self.queue,
        )
        _check(changed)
        needed = (
            "forecast" in (changed.admission, changed.dispatch)
            or changed.queue == "volume"
            or REBALANCERS[changed.rebalance].predicts
        )
        return replace(changed, predicts=needed)


# What a part was called that is now said otherwise.
_REPLACED = {"oracle": "ares-oracle"}


def _check(changed: Preset) -> None:
    """Raise ValueError where a part would change nothing beside the others, and say what fits."""
    if changed.admission == "forecast" and changed.dispatch != "forecast":
        raise ValueError(
            f"admission forecast needs dispatch forecast (not {changed.dispatch}): it chooses the instance itself; "
            "admission open goes with every dispatch"
        )
    if changed.suspends and changed.admission != "forecast":
        plain = ", ".join(name for name, one in PRESETS.items() if not one.suspends)
        raise ValueError(
            f"it suspends requests, which needs admission forecast (not {changed.admission}); "
            f"presets that suspend none: {plain}"
        )


PRESETS: dict[str, Preset] = {
    # A plain prefill-decode router; commanded moves still work.
    "off": Preset(dispatch="round_robin", rebalance="none"),
    "static-rr": Preset(dispatch="round_robin", rebalance="none"),
    "static-least-loaded": Preset(dispatch="least_loaded", rebalance="none"),
    # The paper's rescheduler without its predictor: today's load only.
    "ares-no-prediction": Preset(dispatch="least_loaded", rebalance="current_load"),
    # The paper's system: point predictions, tokens as load, rebalancing alone.
    "paper": Preset(dispatch="least_loaded", rebalance="paper", predicts=True),
    # The migration rule of Llumnix, with the dispatch of the others.
    "llumnix": Preset(dispatch="least_loaded", rebalance="llumnix"),
    # Parts of ours, for the ablation.
    "ares-admission": Preset(
        dispatch="forecast", rebalance="none", admission="forecast", queue="volume", predicts=True
    ),
    "ares-suspension": Preset(
        dispatch="forecast", rebalance="none", admission="forecast", queue="volume", suspends=True, predicts=True
    ),
    "ares-rebalance": Preset(dispatch="least_loaded", rebalance="ares", predicts=True),
    "ares": Preset(
        dispatch="forecast", rebalance="ares", admission="forecast", queue="volume", suspends=True, predicts=True
    ),
    "ares-oracle": Preset(
        dispatch="forecast",
        rebalance="ares",
        admission="forecast",
        queue="volume",
        suspends=True,
        predicts=True,
        knows_lengths=True,
    ),
}


def preset(name: str) -> Preset:
    """Return the preset called `name`; ValueError lists the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}, or a file that ends in .yaml")
    return PRESETS[name]
