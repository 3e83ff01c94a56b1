"""The `ares bench` commands."""

import typer

from ares.bench import decision, drain, overhead, predictor, relay, simulated, simulator, stall
from ares.bench.live import command as live
from ares.bench.live import fidelity_command as fidelity

app = typer.Typer(help="Measure ARES.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure ARES."""


app.command("relay")(relay.command)
app.command("stall")(stall.command)
app.command("overhead")(overhead.command)
app.command("decision")(decision.decision)
app.command("simulator")(simulator.command)
app.command("simulated")(simulated.command)
app.command("predictor")(predictor.command)
app.command("live")(live.command)
app.command("fidelity")(fidelity.command)
app.command("drain")(drain.command)
