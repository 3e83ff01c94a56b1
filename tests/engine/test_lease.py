"""An instance's part of the lease: one holder at a time, and never for long."""

import math

import pytest

from ares.engine.lease import ControllerLease
from ares.protocol import messages, rpc


def asked(lease: ControllerLease, holder: str, now: float, ttl_s: float = 3.0) -> tuple[bool, str]:
    answer = lease.request(messages.Lease(7, holder, ttl_s), now)
    assert answer.call == 7
    return answer.granted, answer.holder


def test_it_is_granted_to_one_at_a_time() -> None:
    lease = ControllerLease()
    assert asked(lease, "a", 100.0) == (True, "a")
    assert asked(lease, "b", 101.0) == (False, "a")
    assert asked(lease, "a", 102.0) == (True, "a")  # extended: to 105
    assert asked(lease, "b", 104.9) == (False, "a")
    assert asked(lease, "b", 105.0) == (True, "b")
    assert asked(lease, "a", 105.1) == (False, "b")


def test_a_lease_that_is_given_back_is_free() -> None:
    lease = ControllerLease()
    asked(lease, "a", 0.0)
    assert asked(lease, "b", 1.0, ttl_s=0.0) == (False, "a")  # b does not hold it
    assert asked(lease, "a", 1.0, ttl_s=0.0) == (True, "")
    assert asked(lease, "b", 1.0) == (True, "b")


def test_only_the_holder_that_disconnects_loses_it() -> None:
    lease = ControllerLease()
    asked(lease, "a", 0.0)
    lease.release("b")
    assert asked(lease, "b", 1.0) == (False, "a")
    lease.release("a")
    assert asked(lease, "b", 1.0) == (True, "b")


@pytest.mark.parametrize(
    ("ttl_s", "lasts_s"),
    [
        (math.inf, rpc.LONGEST_LEASE_S),
        (1e9, rpc.LONGEST_LEASE_S),
        (math.nan, 0.0),
        (-1.0, 0.0),
        (-math.inf, 0.0),
    ],
)
def test_an_unreasonable_duration_is_limited(ttl_s: float, lasts_s: float) -> None:
    lease = ControllerLease()
    asked(lease, "a", 0.0, ttl_s)
    if lasts_s:
        assert not asked(lease, "b", lasts_s - 0.1)[0]
    assert asked(lease, "b", lasts_s)[0]


def test_an_empty_name_is_no_holder() -> None:
    lease = ControllerLease()
    assert asked(lease, "", 0.0) == (False, "")
    assert asked(lease, "a", 0.0) == (True, "a")
