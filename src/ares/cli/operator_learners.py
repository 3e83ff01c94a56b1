"""The part of `ares status` about the predictor: what learners report, and which instances run another version."""

from datetime import datetime

from rich.console import Console
from rich.text import Text

from ares.cli.operator_tables import Row, empty_table
from ares.names import short_version

_EVENTS = 5
_MODELS = ("curve", "champion", "challenger")


def learners(read: Row, to: Console) -> None:
    """Print each learner of a gateway's status: champion and challenger, losses, other versions, newest events."""
    for learner in read.get("learners", ()):
        to.print(Text(_heading(learner)))
        _predictors(learner, to)
        other = [
            f"{row['name']} ({short_version(row['predictor']) or 'none'})"
            for row in read["instances"]
            if row["healthy"] and row.get("predictor", learner["champion"]["version"]) != learner["champion"]["version"]
        ]
        if other:
            to.print(Text(f"instances with another version than the champion: {', '.join(other)}"))
        for event in learner["events"][-_EVENTS:]:
            version = short_version(event["version"]) or "-"
            to.print(Text(f"{_date(event['time'])}  {event['event']} {version}: {event['text']}"))
        to.print()


def refusals(instances: list[Row], to: Console) -> None:
    """Print which instances refused a new version of the predictor, and why."""
    for row in instances:
        if refused := row.get("predictor_refused"):
            version = short_version(refused["version"])
            to.print(Text(f"{row['name']}: refused version {version} of the predictor: {refused['why']}"))


def _heading(learner: Row) -> str:
    name, age_s, outputs = learner["learner"], learner["age_s"], learner["outputs"]
    reported = f"no report for {age_s:,.0f} s; before: " if learner["old"] else ""
    frozen = ", frozen" if learner["frozen"] and learner["doing"] != "frozen" else ""
    recorded = f"{outputs['recorded']:,} outputs recorded, {outputs['needed']:,} needed"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in outputs["dropped"].items() if count)
    return f"predictor (learner {name}): {reported}{learner['doing']}{frozen}; {recorded}" + (
        f"; dropped: {dropped}" if dropped else ""
    )


def _predictors(learner: Row, to: Console) -> None:
    """Print version, training and loss of the curve, the champion and the challenger."""
    losses = _newest_losses(learner["losses"])
    table = empty_table(None)
    for name in ("", "version", "trained on", "since", "loss (tokens)"):
        table.add_column(name, no_wrap=True)
    for model in _MODELS:
        predictor = learner.get(model)
        if model != "curve" and predictor is None:
            continue
        loss = losses.get(model)
        table.add_row(model, *_cells(predictor), "-" if loss is None else f"{loss:,.1f}")
    to.print(table)
    if losses:
        to.print(Text(f"loss: mean CRPS over {losses['outputs']:,} outputs that none of them was trained on"))


def _cells(predictor: Row | None) -> tuple[str, str, str]:
    if predictor is None:
        return "-", "-", "-"
    version = short_version(predictor["version"]) or predictor["kind"]
    return version, f"{predictor['trained_outputs']:,} outputs", _date(predictor["since"])


def _newest_losses(losses: list[Row]) -> Row:
    """Return the newest losses over all positions, or of the newest position where there are no such ones."""
    everywhere = [row for row in losses if row["position"] == "all"]
    newest = everywhere or losses
    return newest[-1] if newest else {}


def _date(time: float) -> str:
    """Return a time in the zone of the terminal."""
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
