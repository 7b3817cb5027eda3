"""A DNS server on loopback, UDP and TCP on one port (RFC 1035), for a zone that fits in a dictionary."""

import asyncio
from collections.abc import Mapping
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

TTL_S = 60
TCP_IDLE_S = 5.0
PORT_TRIES = 20

Zone = Mapping[tuple[str, str], list[str]]
"""Records by (name, type), as in `("example.com.", "A"): ["127.0.0.1"]`. A name that begins with `*.` speaks for all below."""

DEMO_ZONE: Zone = {
    ("example.com.", "A"): ["127.0.0.1"],
    ("example.com.", "AAAA"): ["::1"],
    ("www.example.com.", "A"): ["127.0.0.1"],
    ("example.org.", "A"): ["127.0.0.1"],
    ("example.net.", "A"): ["127.0.0.1"],
    ("*.example.net.", "A"): ["127.0.0.1"],
    ("six.example.org.", "AAAA"): ["::1"],
    ("mail.example.org.", "TXT"): ["v=spf1 -all"],
    ("inside.example.org.", "A"): ["127.0.0.1", "192.168.0.1"],
    ("half.example.org.", "A"): ["127.0.0.1"],
    ("1.0.0.127.in-addr.arpa.", "PTR"): ["loopback.example.net."],
    ("2.0.0.127.in-addr.arpa.", "PTR"): ["zeta.example.net.", "alpha.example.net.", "lost.example.org."],
    ("3.0.0.127.in-addr.arpa.", "PTR"): ["lost.example.org."],
    ("9.0.0.127.in-addr.arpa.", "PTR"): ["silent.example.org."],
    ("5.0.0.127.in-addr.arpa.", "TXT"): ["no name here"],
    ("6.0.0.127.in-addr.arpa.", "PTR"): [f"host-{number:03}.example.net." for number in range(100)],
    (f"1.{'0.' * 31}ip6.arpa.", "PTR"): ["loopback6.example.net."],
}
DEMO_BROKEN = frozenset({("broken.example.org.", "A"), ("half.example.org.", "AAAA"), ("7.0.0.127.in-addr.arpa.", "PTR")})
DEMO_SILENT = frozenset({("silent.example.org.", "A"), ("8.0.0.127.in-addr.arpa.", "PTR")})


class DnsServer:
    """Serves until `stop`. Questions in `broken` get SERVFAIL, those in `silent` nothing, unknown names NXDOMAIN."""

    def __init__(
        self,
        zone: Zone = DEMO_ZONE,
        broken: frozenset[tuple[str, str]] = DEMO_BROKEN,
        silent: frozenset[tuple[str, str]] = DEMO_SILENT,
    ) -> None:
        self.address = ("127.0.0.1", 0)
        self._zone = zone
        self._names = {name for name, _kind in zone}
        self._broken = broken
        self._silent = silent
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(PORT_TRIES):
            self._tcp = await asyncio.start_server(self._serve_tcp, "127.0.0.1", 0)
            self.address = self._tcp.sockets[0].getsockname()
            try:
                self._udp, _ = await loop.create_datagram_endpoint(lambda: _Udp(self), local_addr=self.address)
            except OSError:
                # The port is free for TCP but not for UDP.
                self._tcp.close()
            else:
                return
        raise OSError("no port is free for both TCP and UDP")

    async def stop(self) -> None:
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
            await self._tcp.wait_closed()

    def answer(self, query: bytes, size_max: int) -> bytes | None:
        """The response in wire format, truncated (TC) when it would not fit; None = say nothing."""
        try:
            message = dns.message.from_wire(query)
            [question] = message.question
        except (dns.exception.DNSException, ValueError):
            return None
        response = dns.message.make_response(message, recursion_available=True)
        asked = (question.name.to_text().lower(), dns.rdatatype.to_text(question.rdtype))
        if asked in self._silent:
            return None
        if asked in self._broken:
            response.set_rcode(dns.rcode.SERVFAIL)
            return response.to_wire()
        owner = self._owner(question.name)
        if owner is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif records := self._zone.get((owner, asked[1])):
            response.answer.append(dns.rrset.from_text(question.name, TTL_S, "IN", asked[1], *records))
        return _fitting(response, message, size_max)

    def _owner(self, name: dns.name.Name) -> str | None:
        text = name.to_text().lower()
        wildcard = f"*.{text.partition('.')[2]}"
        known = self._names | {name for name, _kind in self._broken | self._silent}
        return next((owner for owner in (text, wildcard) if owner in known), None)

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(TCP_IDLE_S):
                query = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            if response := self.answer(query, 65535):
                writer.write(len(response).to_bytes(2, "big") + response)
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str | int, int]) -> None:
        response = self._server.answer(data, 512)
        if response is not None and self._transport is not None:
            self._transport.sendto(response, addr)


def _fitting(response: dns.message.Message, query: dns.message.Message, size_max: int) -> bytes:
    try:
        return response.to_wire(max_size=max(size_max, min(query.payload, 1232)))
    except dns.exception.TooBig:
        truncated = dns.message.make_response(query, recursion_available=True)
        truncated.flags |= dns.flags.TC
        return truncated.to_wire()
