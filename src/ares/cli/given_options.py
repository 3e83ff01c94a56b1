"""The options given to `ares simulate`: those without an effect are refused by name."""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import typer

from ares import plugins
from ares.policy import Preset
from ares.traces import WORKLOADS

if TYPE_CHECKING:
    from ares.simulator.scenario import Scenario  # it needs the extra, and `--help` must not


def given_flags(context: typer.Context) -> set[str]:
    """Return the options of a command that were given, by their long names."""
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in flags if name is not None}
    return {flags[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def refuse_before_command(given: Collection[str], command: str) -> None:
    """Refuse options before a sub-command, which has its own; ValueError names them."""
    if given:
        flags = ", ".join(sorted(given))
        raise ValueError(f"{flags} before {command} changes nothing: give it after, ares simulate {command} OPTIONS")


def refuse_not_finite(**values: float | None) -> None:
    """Refuse infinite numbers and what is no number; ValueError names the option."""
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not a finite number")


def refuse_zero(**values: float) -> None:
    """Refuse 0 where it means nothing; ValueError names the option."""
    for name, value in values.items():
        if not value:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")


def refuse_repeated(flag: str, values: Iterable[object]) -> None:
    """Refuse a value that is given twice: its runs would be the same and count twice."""
    every = list(values)
    if twice := [value for n, value in enumerate(every) if value in every[:n]]:
        raise ValueError(f"{flag}: {twice[0]} is given twice")


def refuse_without_effect(given: Collection[str], scenario: "Scenario", policies: Collection[Preset]) -> None:
    """Refuse options that change nothing given the others; ValueError says which and why."""
    for flag, why in _without_effect(given, scenario, policies):
        if flag in given:
            raise ValueError(f"{flag} changes nothing: {why}")


def _without_effect(
    given: Collection[str], scenario: "Scenario", policies: Collection[Preset]
) -> Iterator[tuple[str, str]]:
    if scenario.trace in WORKLOADS:
        for flag in ("--format", "--time-unit", "--prefix-caching"):
            yield flag, f"{scenario.trace} is a built-in workload, not a file; give --trace FILE"
    if "--load" in given:
        yield "--time-unit", "--load sets the rate, whatever the trace's; give --rate-scale to keep the trace's"
    if scenario.prefill == 0:
        yield "--prefill-profile", "--prefill 0 leaves no prefill instances"
    if "--report" not in given:
        yield "--curves", "they are for a report; give --report FOLDER"
    if not plugins.from_file(policies):
        yield (
            "--policy",
            "no preset here uses a policy of that file; give a preset file, or its part by name",
        )
    if all(not policy.moves for policy in policies):
        yield "--period", "no preset here rebalances; give one that does, such as ares-rebalance, or --rebalance"
    if not any(policy.predicts and not policy.knows_lengths for policy in policies):
        yield "--predictor", "no preset here uses a predictor that can err; give one that does, such as ares"
