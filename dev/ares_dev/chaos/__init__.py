"""Chaos: load, moves, drains, kills, pauses and lies, planned by a seed; afterwards the invariants are checked."""
