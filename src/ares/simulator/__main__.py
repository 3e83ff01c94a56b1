"""`python -m ares.simulator`: the same commands as `ares simulate`."""

from ares.simulator.cli import app

app(prog_name="ares simulate")
