"""What a user can mend."""


class PredictorError(Exception):
    """The command cannot go on; the message says why and, where it can, what to do."""
