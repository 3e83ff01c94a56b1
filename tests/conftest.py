"""For all tests."""

import os

from hypothesis import settings

# How long a case takes says nothing on a machine that does other work; pytest's own limit catches what hangs.
settings.register_profile("ares", deadline=None)
settings.load_profile("ares")

# The clients that tests ask with take a proxy of this machine for loopback as well, unless told otherwise.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost", "::1"]))
