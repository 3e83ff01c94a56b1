"""Clients that people use, unmodified, against a running gateway: one file a client, run by its own Python."""
