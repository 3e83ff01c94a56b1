"""Errors that a user can correct."""


class PredictorError(Exception):
    """The command cannot continue; the message gives the reason and, where possible, the remedy."""
