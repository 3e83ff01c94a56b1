"""Measurements: each a command that writes JSON, and the reports made from it."""
