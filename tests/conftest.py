"""For all tests."""

from hypothesis import settings

# How long a case takes says nothing on a machine that does other work; pytest's own limit catches what hangs.
settings.register_profile("ares", deadline=None)
settings.load_profile("ares")
