"""Errors of the learner that an operator can correct."""


class LearnerError(RuntimeError):
    """The learner cannot work; the message has what to do."""
