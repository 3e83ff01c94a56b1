"""A recording is simulated again under the preset that it was made with."""

import numpy as np
import pytest

from ares.simulator.recording import Recording
from ares.simulator.validate import replay
from tests.simulator.test_reference import small, workload


@pytest.mark.parametrize("name", ["static-rr", "balanceroute", "past-future", "ares-admission"])
def test_every_request_of_a_recording_ends_whatever_calls_its_policy(name: str) -> None:
    """Policies in the event loop, in Python between its events, and admission that is asked again every period."""
    work = workload(3, 60, 4.0)
    meta = {"decode_instances": 2, "prefill_instances": 1, "preset": name}
    first, finish = replay(Recording("recorded", work, work.arrival_s, work.arrival_s, meta), small(4000))
    assert (first >= work.arrival_s).all()
    assert np.isfinite(finish).all()
