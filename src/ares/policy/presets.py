"""Presets: a named choice of dispatch, admission, queue order and rebalance."""

from dataclasses import dataclass, field, replace

from ares.policy.admission import ADMISSIONS, QUEUES, AdmissionSettings, SuspendSettings
from ares.policy.moves import RebalanceSettings
from ares.policy.placement import DISPATCHERS
from ares.policy.rebalance import REBALANCERS


@dataclass(frozen=True, slots=True)
class Preset:
    """One complete policy.

    Attributes
    ----------
    dispatch
        First placement: round_robin, least_loaded, or forecast.
    rebalance
        none, current_load, ares, or oracle.
    settings
        Knobs of the rebalancer.
    admission
        open: straight to the instance; forecast: held until the predicted peak of memory fits.
    queue
        fcfs, or volume: smallest predicted memory-time first, the largest gives way.
    suspends
        Whether a long request with time to spare gives way to one that waits; needs admission by forecast.
    predicts
        Whether predictions are used where there are any.
    admission_settings
        Knobs of admission and queue order.
    suspend_settings
        Knobs of suspension.
    """

    dispatch: str
    rebalance: str
    settings: RebalanceSettings = field(default_factory=RebalanceSettings)
    admission: str = "open"
    queue: str = "fcfs"
    suspends: bool = False
    predicts: bool = False
    admission_settings: AdmissionSettings = field(default_factory=AdmissionSettings)
    suspend_settings: SuspendSettings = field(default_factory=SuspendSettings)

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
            if given is not None and given not in known:
                raise ValueError(f"unknown policy {given!r}; known: {', '.join(known)}")
        changed = replace(
            self,
            dispatch=dispatch or self.dispatch,
            admission=admission or self.admission,
            rebalance=rebalance or self.rebalance,
            queue=queue or self.queue,
        )
        _check(changed)
        needed = (
            "forecast" in (changed.admission, changed.dispatch)
            or changed.queue == "volume"
            or changed.rebalance in ("paper", "ares", "oracle")
        )
        return replace(changed, predicts=needed)


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
        dispatch="forecast", rebalance="oracle", admission="forecast", queue="volume", suspends=True, predicts=True
    ),
}


def preset(name: str) -> Preset:
    """Return the preset called `name`; ValueError lists the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
