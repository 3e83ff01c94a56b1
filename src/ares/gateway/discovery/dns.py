"""`dns:HOST:PORT` and `srv:NAME`: the addresses of a name, such as a headless Service, and targets of SRV records."""

import asyncio
import socket
from collections.abc import AsyncGenerator

from ares.gateway.discovery.base import SourceError, checked
from ares.gateway.tuning import DEFAULT, Tuning
from ares.instance_sources import http_url


class AddressSource:
    """All A and AAAA records of a name, by the system's resolver, asked once a period.

    An answer without an address leaves the last one in force: a resolver does not tell a service without pods from a
    fault. What has gone with it is lost anyway, and comes back if it answers again.

    Parameters
    ----------
    name
        The setting.
    host, port
        Of the instances.
    tuning
        The gateway's times and limits.
    """

    def __init__(self, name: str, host: str, port: int, tuning: Tuning = DEFAULT) -> None:
        self.name = name
        self._host, self._port = host, port
        self._period_s = tuning.dns_period_s

    async def states(self) -> AsyncGenerator[list[str]]:
        """Yield the URLs once a period (see `Source`)."""
        while True:
            yield checked(sorted(await self._urls()))
            await asyncio.sleep(self._period_s)

    async def _urls(self) -> set[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that is too long
            raise SourceError(f"{self._host}: {getattr(error, 'strerror', None) or error}") from None
        return {http_url(str(address[0]), self._port) for *_, address in found}


class SrvSource:
    """The targets and ports of the SRV records of a name, asked once a period; an empty answer as in `AddressSource`.

    Parameters
    ----------
    name
        The setting.
    record
        The name of the records, such as `_http._tcp.decode.serving.svc.cluster.local`.
    tuning
        The gateway's times and limits.
    nameserver
        Address and port of the name server; by default those of `/etc/resolv.conf`.
    """

    def __init__(
        self, name: str, record: str, tuning: Tuning = DEFAULT, nameserver: tuple[str, int] | None = None
    ) -> None:
        self.name = name
        self._record = record
        self._period_s = tuning.dns_period_s
        self._nameserver = nameserver

    async def states(self) -> AsyncGenerator[list[str]]:
        """Yield the URLs once a period (see `Source`)."""
        from dns import asyncresolver, exception  # an extra: `instance_sources` has checked that it is there

        try:
            resolver = asyncresolver.Resolver(configure=self._nameserver is None)
            if self._nameserver is not None:
                resolver.nameservers, resolver.port = [self._nameserver[0]], self._nameserver[1]
            while True:
                answer = await resolver.resolve(self._record, "SRV", search=True)
                yield checked(sorted({http_url(one.target.to_text(omit_final_dot=True), one.port) for one in answer}))
                await asyncio.sleep(self._period_s)
        except exception.DNSException as error:
            first_line = str(error).partition("\n")[0]
            raise SourceError(f"{self._record}: {first_line}") from None
