"""Presets as data, and settings given beside one: what is wrong is refused by name."""

from dataclasses import dataclass, replace

import pytest

from ares.policy import PRESETS, Rebalance
from ares.policy.dispatch.balanceroute import BalanceRouteSettings
from ares.policy.preset_files import make_preset, with_defaults, with_settings
from ares.policy.rebalance import REBALANCERS
from ares.policy.registry import Registry


def test_a_file_can_say_what_presets_are() -> None:
    data = {"dispatch": "forecast", "admission": {"name": "forecast", "suspends": True}, "rebalance": "ares"}
    assert make_preset(data, {}) == PRESETS["ares"]
    assert make_preset({"admission": "pausing"}, {}) == PRESETS["pausing"]
    assert make_preset({"admission": "forecast"}, {}) == PRESETS["ares-admission"], "with the dispatch that it needs"
    made = make_preset({"dispatch": {"name": "balanceroute", "lookahead": 0}, "admission": {"name": "open"}}, {})
    assert made == replace(PRESETS["balanceroute"], dispatch_settings=BalanceRouteSettings(lookahead=0))
    assert make_preset({"rebalance": {"name": "current_load"}}, {}) == PRESETS["ares-no-prediction"]
    assert make_preset({}, {}) == PRESETS["static-least-loaded"]


def test_settings_come_from_the_file_then_from_those_beside_it() -> None:
    made = make_preset({"rebalance": {"name": "ares", "theta": 0.3, "sources": 9}}, {"cooldown_s": 3.0, "other": 1})
    assert (made.rebalance_settings.theta, made.rebalance_settings.sources, made.cooldown_s) == (0.3, 9, 3.0)
    changed = with_settings(made, ["rebalance.theta=0.2", "rebalance.cooldown_s=7"])
    assert changed == replace(made, rebalance_settings=replace(made.rebalance_settings, theta=0.2, cooldown_s=7.0))
    assert with_defaults(PRESETS["off"], {"cooldown_s": 3.0}) == PRESETS["off"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "must be a mapping with some of dispatch, admission"),
        ({"dispach": "forecast"}, "unknown part 'dispach'; known: dispatch"),
        ({"dispatch": ["a"]}, "dispatch must be a name, or a mapping"),
        ({"dispatch": {"name": "round_robin", "x": 1}}, "dispatch policy 'round_robin': unknown setting 'x'"),
        ({"dispatch": "x"}, "unknown dispatch 'x'; known: balanceroute"),
        ({"admission": "x"}, "unknown admission 'x'; known: past-future"),
        ({"dispatch": "least_loaded", "admission": "forecast"}, "needs dispatch forecast"),
        ({"dispatch": "round_robin", "admission": "pausing"}, "needs dispatch least_loaded"),
        ({"admission": {"name": "forecast", "suspends": "yes"}}, "suspends must be true or false"),
        ({"admission": {"name": "forecast", "order": "lifo"}}, "order must be one of fcfs, shortest_memory_time"),
        ({"suspends": True}, "suspends is now a setting: give admission: {name: forecast, suspends: ...}"),
        ({"queue": "shortest_memory_time"}, "queue is now a setting: give admission: {name: forecast, order: ...}"),
        ({"rebalance": "x"}, "unknown rebalance 'x'; known: ares"),
        ({"rebalance": 3}, "rebalance must be a name, or a mapping"),
        ({"rebalance": {"name": "none", "theta": 1}}, "'none': unknown setting 'theta'; known: none"),
        (
            {"rebalance": {"name": "current_load", "horizon": 1}},
            "unknown setting 'horizon'; known: theta, minimum_gain",
        ),
        ({"rebalance": {"name": "ares", "theta": "0.1"}}, "setting theta must be a number, not '0.1'"),
        (
            {"copies": {"name": "most_saved", "link_bytes_s": "2e8"}},  # as YAML gives `link_bytes_s: 2e8`
            r"must be a number, not '2e8' \(YAML takes this for text: write 200000000.0\)",
        ),
        ({"copies": {"name": "most_saved", "at_once": "1e1"}}, r"a whole number, not '1e1' \(.*: write 10\)"),
        ({"rebalance": {"name": "ares", "theta": float("nan")}}, "theta must be a number, not nan"),
        ({"rebalance": {"name": "ares", "points": 2.5}}, "points must be a whole number"),
        ({"rebalance": {"name": "ares", "points": True}}, "points must be a whole number"),
        ({"rebalance": {"name": "ares", "points": 0}}, "points and decay must be greater than 0"),
        ({"rebalance": {"name": "paper", "reserve": 2}}, "reserve must be from 0 to 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(data: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_preset(data, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["theta=1"], "give dispatch.SETTING=VALUE or admission.SETTING=VALUE or rebalance.SETTING=VALUE"),
        (["rebalance.theta"], "or rebalance.SETTING=VALUE"),
        (["queue.order=fcfs"], "give dispatch.SETTING=VALUE"),
        (["dispatch.x=1"], "dispatch policy 'forecast': unknown setting 'x'; known: cached_weight"),
        (["admission.ttft_s=1"], "admission policy 'forecast': unknown setting 'ttft_s'; known: deviations"),
        (["admission.order=lifo"], "setting order must be one of fcfs, shortest_memory_time, not 'lifo'"),
        (["admission.suspends=maybe"], "setting suspends must be true or false"),
        (["rebalance.thta=1"], "'ares': unknown setting 'thta'; known: theta"),
        (["rebalance.theta=much"], "must be a number, not 'much'"),
        (["rebalance.theta=inf"], "must be a number, not inf"),
        (["rebalance.sources=1.5"], "must be a whole number"),
        (["rebalance.theta=1", "rebalance.theta=2"], "given twice"),
    ],
)
def test_what_is_wrong_beside_a_preset_is_said(given: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_settings(PRESETS["ares"], given)


def test_each_built_in_has_settings_of_its_own() -> None:
    names = {name: set(kind.Settings.__dataclass_fields__) for name, kind in REBALANCERS.items() if kind.moves}
    assert names["current_load"] == {"theta", "minimum_gain", "reserve", "moves_per_round", "cooldown_s"}
    assert names["ares"] - names["paper"] == {"deviations", "memory_weight"}
    assert not REBALANCERS["none"].moves


def test_only_policies_are_registered_and_each_name_once() -> None:
    @dataclass
    class Thawed:
        theta: float = 1.0

    @dataclass(frozen=True)
    class Required:
        theta: float

    @dataclass(frozen=True)
    class Listed:
        theta: tuple[int, ...] = ()

    for settings, said in ((Thawed, "frozen"), (Required, "theta"), (Listed, "setting theta must be a bool")):
        with pytest.raises(TypeError, match=said):
            REBALANCERS.register("mine")(type("Mine", (Rebalance,), {"Settings": settings}))
    with pytest.raises(TypeError, match="must be a subclass"):
        REBALANCERS.register("mine")(int)
    with pytest.raises(ValueError, match="'ares' is already registered"):
        REBALANCERS.register("ares")(type("Mine", (Rebalance,), {}))
    assert "mine" not in REBALANCERS
    other: Registry[Rebalance] = Registry(Rebalance, "decide(self, cluster)")
    with pytest.raises(ValueError, match="is not a valid name"):
        other.register("two words")(Rebalance)
