"""Options that commands of several groups share."""

from typing import Annotated

import typer

Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="Python file that registers a policy; may be repeated.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Setting of the presets, as rebalance.theta=0.2; may be repeated.")
]
