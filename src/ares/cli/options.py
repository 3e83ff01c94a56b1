"""Options that commands of several groups share."""

from typing import Annotated

import typer

Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="Python file that registers a policy; may be repeated.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Setting of the presets, as rebalance.theta=0.2; may be repeated.")
]
OtlpTracesEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Collector of OpenTelemetry that gets a trace of every request (docs/tracing.md)."
    ),
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="text|json", help="Lines of the log as text or as JSON; by default text.")
]
LogLevel = Annotated[
    str | None,
    typer.Option(metavar="debug|info|warning|error", help="The lowest level that is logged; by default info."),
]
