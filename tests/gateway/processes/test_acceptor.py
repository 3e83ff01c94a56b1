"""Who gets which connection."""

import resource
import socket
import time
from collections.abc import Iterator

import pytest

from ares.addresses import AddressError
from ares.gateway.processes.acceptor import CONNECTION, Acceptor, Link, listen


@pytest.fixture
def links() -> Iterator[list[Link]]:
    made = [Link.make() for _ in range(3)]
    for link in made:
        link.takes = True
    yield made
    for link in made:
        link.here.close()
        link.there.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    (made,) = listen("127.0.0.1", 0)
    made.settimeout(5)  # an attempt to accept is to wait for the client
    yield made
    made.close()


def respond(_: int) -> bool:
    return True


def none_open(_: int) -> int:
    return 0


def received(link: Link) -> list[int]:
    """The ports of the clients that a process got, in order."""
    ports: list[int] = []
    while True:
        try:
            message, descriptors, *_ = socket.recv_fds(link.there, 1, 1)
        except BlockingIOError:
            return ports
        assert message == CONNECTION
        with socket.socket(fileno=descriptors[0]) as connection:
            ports.append(connection.getpeername()[1])


def connect(listener: socket.socket, acceptor: Acceptor, count: int) -> list[int]:
    """Connect one client after the other; return their ports."""
    clients = [socket.create_connection(listener.getsockname()) for _ in range(count)]
    listener.setblocking(False)
    acceptor.accept(listener)
    ports = [client.getsockname()[1] for client in clients]
    for client in clients:
        client.close()
    return ports


def test_processes_get_connections_in_turn(links: list[Link], listener: socket.socket) -> None:
    acceptor = Acceptor(links, respond, none_open)
    ports = connect(listener, acceptor, 7)
    assert [received(link) for link in links] == [ports[0::3], ports[1::3], ports[2::3]]
    assert not acceptor.holds


def test_one_with_fewer_open_connections_gets_the_next(links: list[Link], listener: socket.socket) -> None:
    open_now = [3, 0, 1]
    acceptor = Acceptor(links, respond, lambda number: open_now[number])
    ports = connect(listener, acceptor, 5)
    # What is handed out counts before it is taken.
    got = [received(link) for link in links]
    assert [len(one) for one in got] == [0, 3, 2]
    assert got[1][0] == ports[0]
    open_now = [3, 3, 3]
    ports = connect(listener, acceptor, 3)
    assert [len(received(link)) for link in links] == [1, 1, 1]
    # A stream to one, and a probe to another that ends: the next stream is not for the first.
    open_now = [0, 0, 0]
    for _ in range(6):
        connect(listener, acceptor, 1)
        for number, link in enumerate(links):
            open_now[number] += len(received(link))
        connect(listener, acceptor, 1)
        for link in links:
            received(link)
    assert open_now == [2, 2, 2]


def test_one_that_takes_none_is_left_out(links: list[Link], listener: socket.socket) -> None:
    acceptor = Acceptor(links, respond, none_open)
    links[1].takes = False
    ports = connect(listener, acceptor, 4)
    assert [received(link) for link in links] == [ports[0::2], [], ports[1::2]]


def test_one_that_hangs_gets_none_but_where_all_do(links: list[Link], listener: socket.socket) -> None:
    hanging = {1}
    acceptor = Acceptor(links, lambda number: number not in hanging, none_open)
    ports = connect(listener, acceptor, 4)
    assert [received(link) for link in links] == [ports[0::2], [], ports[1::2]]
    hanging |= {0, 2}
    ports = connect(listener, acceptor, 3)
    assert sorted(port for link in links for port in received(link)) == sorted(ports)


def test_one_that_does_not_read_gets_no_more_than_its_socket_holds(links: list[Link], listener: socket.socket) -> None:
    acceptor = Acceptor(links[:1], respond, none_open)
    ports: list[int] = []
    while not acceptor.holds:
        ports += connect(listener, acceptor, 50)
    acceptor.hand_out()
    assert acceptor.holds
    got = received(links[0])
    acceptor.hand_out()
    assert not acceptor.holds
    acceptor.accept(listener)
    assert got + received(links[0]) == ports


def test_where_nobody_takes_one_it_waits(links: list[Link], listener: socket.socket) -> None:
    acceptor = Acceptor(links, respond, none_open)
    for link in links:
        link.takes = False
    ports = connect(listener, acceptor, 2)
    assert acceptor.holds
    links[2].takes = True
    acceptor.hand_out()
    acceptor.accept(listener)
    assert received(links[2]) == ports


def test_an_address_that_is_taken(listener: socket.socket) -> None:
    host, port = listener.getsockname()
    with pytest.raises(AddressError, match=f"cannot listen on {host}:{port}"):
        listen(host, port)


def test_without_room_for_a_file_it_pauses(links: list[Link], listener: socket.socket) -> None:
    acceptor = Acceptor(links, respond, none_open)
    listener.setblocking(False)
    with socket.create_connection(listener.getsockname()):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            acceptor.accept(listener)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert acceptor.pauses_until > time.monotonic()
        acceptor.accept(listener)
        assert [len(received(link)) for link in links] == [1, 0, 0]
