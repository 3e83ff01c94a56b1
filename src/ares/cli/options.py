"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

# Of a command whose other flags go to vLLM, the mock engine or the gateway.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
LAST_PORT = 65535

Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="Python file that registers a policy; may be repeated.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the preset, as rebalance.theta=0.2; repeat for each.")
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
ControlKeyFile = Annotated[
    Path | None, typer.Option(help="File with the control channel's key; or ARES_CONTROL_KEY (docs/security.md).")
]
AllowUnsupportedVllm = Annotated[
    bool, typer.Option("--allow-unsupported-vllm", help="Try a version of vLLM that ARES does not support.")
]
Simulate = Annotated[
    str | None, typer.Option(metavar="PROFILE", help="Use mock engines of this profile (docs/mock-engine.md).")
]
