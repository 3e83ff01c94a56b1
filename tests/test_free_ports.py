"""Tests for ports that nothing listens on."""

import socket

import pytest

from ares import free_ports
from ares.free_ports import free_port

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_ports.free_ports(HOST, 8)
    monkeypatch.setattr(free_ports, "candidates", range(first, first + 8))
    monkeypatch.setattr(free_ports, "given", set())


def test_none_is_given_twice_before_all_are() -> None:
    assert {free_port(HOST) for _ in range(8)} == set(free_ports.candidates)
    assert free_port(HOST) in free_ports.candidates


def test_ports_in_a_row_are_given_to_nobody_else() -> None:
    first = free_ports.free_ports(HOST, 5)
    assert {free_port(HOST) for _ in range(3)}.isdisjoint(range(first, first + 5))


def test_what_is_excluded_or_in_use_is_not_given() -> None:
    used, excluded, *rest = free_ports.candidates
    with socket.create_server((HOST, used)):
        assert {free_port(HOST, [excluded]) for _ in range(20)} == set(rest)


def test_where_there_are_none_the_error_says_so() -> None:
    with pytest.raises(OSError, match="no free port on"):
        free_port(HOST, free_ports.candidates)
    with pytest.raises(OSError, match="no 9 free ports in a row"):
        free_ports.free_ports(HOST, 9)
