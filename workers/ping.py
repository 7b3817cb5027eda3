"""Ping: does the target answer, and how fast. ICMP echoes where the kernel lets us, TCP connects where it does not."""

import asyncio
import ctypes
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from time import perf_counter
from typing import Literal, NamedTuple

from icmplib import ICMPRequest, ICMPSocketError, ICMPv4Socket, ICMPv6Socket, SocketPermissionError
from icmplib.utils import unique_identifier
from pydantic import TypeAdapter

from domain.errors import ErrorCode
from events.facts import Target
from workers.lookup import Answer, LookupFailed, Parser, RawAnswer, Result
from workers.network import Network, PingSettings

READS_MAX = 64
"""A raw socket hears all ICMP traffic of the host: after this many packets the event loop gets its turn."""

ICMP_HEADER_BYTES = 8
PAYLOAD_BYTES = 56

IP_RECVTTL = 12
SO_ATTACH_FILTER = 26
"""Linux's numbers; Python 3.11's socket module does not name them."""


class Echo(Result):
    """One question and what became of it: `roundtripTimeMs` and `ttl` (hops the reply had left) are null when unknown.

    `status`: Success, Refused (TCP: the host said no, so it is there), TimedOut, DestinationUnreachable, TtlExpired, NotSent.
    """

    success: bool
    roundtrip_time_ms: float | None = None
    status: str
    ttl: int | None = None


class PingResult(Result):
    """`target` is as it was asked, `address` the one that was pinged (a domain's first).

    `packetLoss` is in percent, 0 to 100. Times are in milliseconds over the answered echoes. `method` tcp = the kernel
    permits no ICMP here, so the times are those of TCP handshakes.
    """

    target: str
    address: str
    packets_sent: int
    packets_received: int
    packet_loss: float
    average_roundtrip_ms: float
    min_roundtrip_ms: float
    max_roundtrip_ms: float
    method: Literal["icmp", "tcp"]
    results: list[Echo]


async def look_up(target: Target, net: Network) -> Answer[PingResult]:
    """Fails with `no_reply` when every echo is lost: a host that says nothing must not look like an answer."""
    address = (await net.addresses_of(target, net.policy.refusal_to_probe))[0]
    method, echoes = await _echoes(address, net.settings.ping)
    about = {"target": target.canonical, "address": address, "method": method}
    return PARSER.read(RawAnswer(about, ECHOES.dump_json(echoes)), method)


def parse(raw: RawAnswer) -> PingResult:
    """The body is what was measured, a JSON list of `Echo`: no packet says more about an echo than that."""
    address, echoes = raw.about["address"], ECHOES.validate_json(raw.body)
    times_ms = [echo.roundtrip_time_ms for echo in echoes if echo.success and echo.roundtrip_time_ms is not None]
    if all(echo.status == "NotSent" for echo in echoes):
        raise LookupFailed(ErrorCode.NETWORK_UNREACHABLE, "This host has no way to send to the address.")
    if not times_ms:
        raise LookupFailed(ErrorCode.NO_REPLY, f"The target answered none of {len(echoes)} echoes (100 % packet loss).")
    return PingResult(
        target=raw.about["target"],
        address=address,
        packets_sent=len(echoes),
        packets_received=len(times_ms),
        packet_loss=round(100 * (1 - len(times_ms) / len(echoes)), 1),
        average_roundtrip_ms=round(sum(times_ms) / len(times_ms), 3),
        min_roundtrip_ms=min(times_ms),
        max_roundtrip_ms=max(times_ms),
        method=raw.about["method"],
        results=echoes,
    )


PARSER = Parser("ping", 1, parse)
ECHOES = TypeAdapter(list[Echo])

Method = Literal["icmp", "tcp"]
Probe = Callable[[str, PingSettings], Awaitable[list[Echo]]]


async def _echoes(address: str, settings: PingSettings) -> tuple[Method, list[Echo]]:
    for method, probe in PROBES[settings.method]:
        try:
            return method, await probe(address, settings)
        except SocketPermissionError:
            continue
    raise LookupFailed(ErrorCode.PROBE_NOT_PERMITTED, f"This host does not permit pings by the method {settings.method!r}.")


async def _raw_icmp(address: str, settings: PingSettings) -> list[Echo]:
    return await _icmp(address, settings, privileged=True)


async def _datagram_icmp(address: str, settings: PingSettings) -> list[Echo]:
    return await _icmp(address, settings, privileged=False)


async def _icmp(address: str, settings: PingSettings, *, privileged: bool) -> list[Echo]:
    kind = ICMPv6Socket if ":" in address else ICMPv4Socket
    with closing(kind(privileged=privileged)) as icmp:
        _ask_for_hop_limits(icmp.sock)
        icmp.blocking = False
        # A reply must bring back three things: the ping's number, the echo's sequence and its random payload. A raw socket
        # hears the replies to all pings of the host, and another process may well count its pings from the same number.
        number = unique_identifier()
        if privileged:
            _hear_only(number, icmp)
        echoes = []
        for sequence in range(settings.echoes):
            await asyncio.sleep(settings.interval_s if sequence else 0)
            request = ICMPRequest(address, id=number, sequence=sequence, payload=secrets.token_bytes(PAYLOAD_BYTES))
            echoes.append(await _echo(icmp, request, settings.reply_timeout_s))
        return echoes


async def _echo(icmp: ICMPv4Socket | ICMPv6Socket, request: ICMPRequest, timeout_s: float) -> Echo:
    sent_at = perf_counter()
    try:
        icmp.send(request)
    except ICMPSocketError:
        return Echo(success=False, status="NotSent")
    try:
        async with asyncio.timeout(timeout_s):
            reply = await _reply_to(request, icmp)
    except TimeoutError:
        return Echo(success=False, status="TimedOut")
    if reply.status != "Success":
        return Echo(success=False, status=reply.status)
    return Echo(success=True, status="Success", roundtrip_time_ms=_milliseconds(reply.read_at - sent_at), ttl=reply.ttl)


class Reply(NamedTuple):
    status: str
    ttl: int | None
    read_at: float


async def _reply_to(request: ICMPRequest, icmp: ICMPv4Socket | ICMPv6Socket) -> Reply:
    """Unlike this, icmplib's own `receive` gives no TTL and takes a stranger's packet with the right numbers for a reply."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(icmp.sock, readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            for packet, ttl in _packets(icmp):
                if status := _status(packet, request, v6=isinstance(icmp, ICMPv6Socket)):
                    return Reply(status, ttl, perf_counter())
    finally:
        loop.remove_reader(icmp.sock)


def _packets(icmp: ICMPv4Socket | ICMPv6Socket) -> Iterator[tuple[bytes, int | None]]:
    """ICMP messages in hand, without IP header, with the hop limit that each arrived with."""
    for _ in range(READS_MAX):
        try:
            packet, ancillary, _flags, _source = icmp.sock.recvmsg(2048, socket.CMSG_SPACE(4))
        except BlockingIOError:
            return
        except OSError:
            # A pending ICMP error of an earlier packet; reading it has cleared it.
            continue
        if icmp.is_privileged and isinstance(icmp, ICMPv4Socket):
            packet = packet[_ipv4_header_bytes(packet) :]
        yield packet, next((int.from_bytes(value, "little") for _level, _type, value in ancillary), None)


def _status(packet: bytes, request: ICMPRequest, *, v6: bool) -> str | None:
    """What the message says about our echo, or None when it is about something else (RFC 792, RFC 4443)."""
    echo_reply, statuses = (129, ICMPV6_ERRORS) if v6 else (0, ICMPV4_ERRORS)
    if len(packet) < ICMP_HEADER_BYTES:
        return None
    if packet[0] == echo_reply:
        ours = _numbers(packet) == (request.id, request.sequence) and packet[ICMP_HEADER_BYTES:] == request.payload
        return "Success" if ours else None
    quoted = packet[ICMP_HEADER_BYTES:]
    quoted = quoted[40 if v6 else _ipv4_header_bytes(quoted) :]
    if packet[0] in statuses and len(quoted) >= ICMP_HEADER_BYTES and quoted[0] == (128 if v6 else 8):
        return statuses[packet[0]] if _numbers(quoted) == (request.id, request.sequence) else None
    return None


ICMPV4_ERRORS = {3: "DestinationUnreachable", 11: "TtlExpired"}
ICMPV6_ERRORS = {1: "DestinationUnreachable", 3: "TtlExpired"}


def _numbers(message: bytes) -> tuple[int, int]:
    return int.from_bytes(message[4:6], "big"), int.from_bytes(message[6:8], "big")


def _ipv4_header_bytes(packet: bytes) -> int:
    return (packet[0] & 0x0F) * 4 if packet else 0


def _hear_only(number: int, icmp: ICMPv4Socket | ICMPv6Socket) -> None:
    """Has the kernel drop echo requests, and the replies to other pings, before they queue up on a raw socket.

    Without it each of n pings reads the replies of all n, and at a few hundred the queues overflow: answered echoes look lost.
    """
    v6 = isinstance(icmp, ICMPv6Socket)
    reply, request = (129, 128) if v6 else (0, 8)
    # Classic BPF: (code, jump if true, jump if false, operand). X is where the ICMP message starts.
    program = [
        (0x01, 0, 0, 0) if v6 else (0xB1, 0, 0, 0),  # X = 0, or the length of the IPv4 header
        (0x50, 0, 0, 0),  # A = type
        (0x15, 0, 2, reply),
        (0x48, 0, 0, 4),  # A = identifier
        (0x15, 1, 2, number),
        (0x15, 1, 0, request),
        (0x06, 0, 0, 0xFFFF),  # keep
        (0x06, 0, 0, 0),  # drop
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    with suppress(OSError):
        # A kernel without filters only makes us read more.
        icmp.sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))


def _ask_for_hop_limits(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)


async def _tcp(address: str, settings: PingSettings) -> list[Echo]:
    echoes = []
    for sequence in range(settings.echoes):
        await asyncio.sleep(settings.interval_s if sequence else 0)
        echoes.append(await _knock(address, settings))
    return echoes


async def _knock(address: str, settings: PingSettings) -> Echo:
    """Tries all ports at once; the first that answers counts, since a firewall may swallow one of them."""
    began_at = perf_counter()
    knocks = [asyncio.create_task(_connect(address, port)) for port in settings.tcp_ports]
    worst = Echo(success=False, status="TimedOut")
    try:
        for finished in asyncio.as_completed(knocks, timeout=settings.reply_timeout_s):
            status = await finished
            if status in ("Success", "Refused"):
                return Echo(success=True, status=status, roundtrip_time_ms=_milliseconds(perf_counter() - began_at))
            worst = Echo(success=False, status=status)
    except TimeoutError:
        pass
    finally:
        for knock in knocks:
            knock.cancel()
        await asyncio.gather(*knocks, return_exceptions=True)
    return worst


async def _connect(address: str, port: int) -> str:
    loop = asyncio.get_running_loop()
    try:
        [(family, kind, _protocol, _name, where), *_] = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        # The zone of a link-local address names an interface that this host does not have.
        return "NotSent"
    with socket.socket(family, kind) as sock:
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, where)
        except ConnectionRefusedError:
            return "Refused"
        except OSError:
            return "DestinationUnreachable"
        return "Success"


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


PROBES: dict[str, list[tuple[Method, Probe]]] = {
    "auto": [("icmp", _raw_icmp), ("icmp", _datagram_icmp), ("tcp", _tcp)],
    "icmp": [("icmp", _raw_icmp)],
    "icmp-datagram": [("icmp", _datagram_icmp)],
    "tcp": [("tcp", _tcp)],
}
