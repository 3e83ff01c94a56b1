"""`python -m ares.simulator`: the same commands as `ares simulate`."""

from ares.cli.simulate import app

app(prog_name="ares simulate")
