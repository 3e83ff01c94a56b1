"""The version of a checkpoint that ships."""

from ares.learner.shipped import by_version


def version_for(model: str) -> str:
    """Return the version of the one that ships for a model."""
    (version,) = (version for version, found in by_version().items() if found.model == model)
    return version
