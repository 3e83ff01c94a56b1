"""Measurements of ARES: the commands of `ares bench`."""
