import asyncio
import socket
from typing import Any

import pytest

from ares.gateway.discovery.dns import AddressSource, SrvSource
from ares.gateway.tuning import Tuning
from tests.gateway.discovery.following import following

QUICK = Tuning(dns_period_s=0.01)


async def test_all_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [["10.0.0.2", "10.0.0.1", "fd00::1"], socket.gaierror(-3, "try again"), []]

    async def resolve(host: str, port: int, **options: Any) -> list[Any]:
        assert (host, port) == ("decode", 8100)
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        return [(socket.AF_INET, options["type"], 6, "", (address, port)) for address in answer]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with following(AddressSource("dns", "decode", 8100, QUICK)) as found:
        assert await found.next() == ["http://10.0.0.1:8100", "http://10.0.0.2:8100", "http://[fd00::1]:8100"]
        answers.pop(0)
        await found.until("decode: try again")
        answers[0] = ["10.0.0.7"]
        await found.until(["http://10.0.0.7:8100"])


async def test_the_resolver_of_this_machine() -> None:
    async with following(AddressSource("dns", "localhost", 8100, QUICK)) as found:
        said = await found.next()
        assert "http://127.0.0.1:8100" in said
    async with following(AddressSource("dns", f"{'x' * 64}.invalid", 8100, QUICK)) as found:
        assert str(await found.next()).startswith("xxx")


class NameServer(asyncio.DatagramProtocol):
    """Answers every question with the same SRV records; with none, the name does not exist."""

    def __init__(self, records: list[str]) -> None:
        self.records = records

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        from dns import message, rcode, rrset

        query = message.from_wire(data)
        answer = message.make_response(query)
        if self.records:
            answer.answer.append(rrset.from_text_list(query.question[0].name, 5, "IN", "SRV", self.records))
        else:
            answer.set_rcode(rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(), address)


async def test_targets_of_srv_records() -> None:
    pytest.importorskip("dns")
    records = ["0 1 8100 decode-0.example.", "0 1 8101 decode-1.example."]
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: NameServer(records), local_addr=("127.0.0.1", 0)
    )
    port = transport.get_extra_info("sockname")[1]
    source = SrvSource("srv", "_http._tcp.decode.example.", QUICK, ("127.0.0.1", port))
    async with following(source) as found:
        assert await found.next() == ["http://decode-0.example:8100", "http://decode-1.example:8101"]
        server.records = []
        await found.until("_http._tcp.decode.example.: The DNS query name does not exist: _http._tcp.decode.example.")
        server.records = records[1:]
        await found.until(["http://decode-1.example:8101"])
    transport.close()
