"""Chaos: load, moves, drains, kills, pauses and telemetry faults by a seed, and then a check of the invariants."""
