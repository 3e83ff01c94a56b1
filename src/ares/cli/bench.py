"""The `ares bench` commands."""

from collections.abc import Callable

import typer

from ares.bench import (
    decision,
    drain,
    first_tokens,
    overhead,
    predictor,
    relay,
    rollouts,
    simulated,
    simulator,
    stall,
)
from ares.bench.live import command as live
from ares.bench.live import fidelity_command as fidelity

app = typer.Typer(help="Measure ARES.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure ARES."""


_COMMANDS: dict[str, Callable[..., object]] = {
    "relay": relay.command,
    "first-tokens": first_tokens.command,
    "stall": stall.command,
    "overhead": overhead.command,
    "decision": decision.decision,
    "simulator": simulator.command,
    "simulated": simulated.command,
    "rollouts": rollouts.command,
    "predictor": predictor.command,
    "live": live.command,
    "fidelity": fidelity.command,
    "drain": drain.command,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
