"""Presets: a named choice of dispatch and rebalance."""

from dataclasses import dataclass, field

from ares.policy.rebalance import RebalanceSettings


@dataclass(frozen=True, slots=True)
class Preset:
    """One complete policy."""

    dispatch: str
    rebalance: str
    settings: RebalanceSettings = field(default_factory=RebalanceSettings)


PRESETS: dict[str, Preset] = {
    # A plain prefill-decode router; commanded moves still work.
    "off": Preset(dispatch="round_robin", rebalance="none"),
    "static-rr": Preset(dispatch="round_robin", rebalance="none"),
    "static-least-loaded": Preset(dispatch="least_loaded", rebalance="none"),
    # The paper's rescheduler without its predictor: today's load only.
    "ares-no-prediction": Preset(dispatch="least_loaded", rebalance="current_load"),
}


def preset(name: str) -> Preset:
    """Return the preset called `name`; ValueError lists the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
