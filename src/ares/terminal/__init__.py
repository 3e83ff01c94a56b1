"""Shared by all commands at the terminal: progress, tables, output files, signals, errors, requests to a gateway."""
