"""For all tests."""

import os
import signal

from hypothesis import settings

# How long a case takes says nothing on a machine that does other work; pytest's own limit catches what hangs.
settings.register_profile("ares", deadline=None)
settings.load_profile("ares")

# A shell starts what it puts into the background with Ctrl-C ignored; tests of Ctrl-C must not depend on it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two threads of torch, or of a BLAS, that share a core with others' work wait for each other at every small operation:
# the predictor's networks train ten times more slowly so. To be set before torch is imported; processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The clients that tests ask with take a proxy of this machine for loopback as well, unless told otherwise.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost", "::1"]))
