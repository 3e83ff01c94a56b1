"""`python -m ares`: the `ares` command."""

from ares.cli.main import main

main()
