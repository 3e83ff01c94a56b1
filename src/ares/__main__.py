"""`python -m ares`: the `ares` command."""

from ares.cli import main

main()
