"""The local peers that the end-to-end tests' lookups ask, and a record of what they were asked.

Every address 127.0.N.1 has a place, a block and a name of its own, so that an answer that ended up in another job's document
shows.
"""

import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.rdatatype

from app.demo.dns_server import DEMO_ZONE, DnsServer, Zone
from app.demo.peers import DEMO_TLDS, bootstrap_file
from app.demo.rdap_server import RdapServer
from tests.peers.mmdb import DEMO_CITY, build_mmdb

NEIGHBOURS = range(1, 251)
"""The N of the addresses 127.0.N.1."""

ZONE: Zone = {
    **DEMO_ZONE,
    ("missing.org.", "A"): ["127.0.0.1"],
    **{(f"1.{n}.0.127.in-addr.arpa.", "PTR"): [f"neighbour-{n}.example.net."] for n in NEIGHBOURS},
}
PLACES: Mapping[str, dict[str, Any]] = {
    "127.0.0.0/24": DEMO_CITY,
    "::1/128": DEMO_CITY,
    **{f"127.0.{n}.0/24": {**DEMO_CITY, "city": {"names": {"en": f"Neighbour City {n}"}}} for n in NEIGHBOURS},
}


class RecordingDns(DnsServer):
    """`asked` holds the last questions, as in `("1.0.0.127.in-addr.arpa.", "PTR")`. Names in `muted` get no answer for now."""

    def __init__(self) -> None:
        super().__init__(ZONE)
        self.asked: deque[tuple[str, str]] = deque(maxlen=20_000)
        self.muted: set[str] = set()

    def answer(self, query: bytes, size_max: int) -> bytes | None:
        try:
            for question in dns.message.from_wire(query).question:
                name = question.name.to_text().lower()
                self.asked.append((name, dns.rdatatype.to_text(question.rdtype)))
                if name in self.muted:
                    return None
        except dns.exception.DNSException:
            pass
        return super().answer(query, size_max)


class Served:
    """Running peers on loopback; ICMP is answered by the kernel."""

    def __init__(self, folder: Path) -> None:
        self.rdap = RdapServer()
        self.dns = RecordingDns()
        self._mmdb = folder / "places.mmdb"
        self._bootstrap = folder / "rdap_bootstrap"

    async def start(self) -> None:
        await self.rdap.start()
        await self.dns.start()
        self._bootstrap.mkdir(parents=True)
        for kind, entries in {"ipv4": ["0.0.0.0/0"], "ipv6": ["::/0"], "dns": DEMO_TLDS}.items():
            (self._bootstrap / f"{kind}.json").write_bytes(bootstrap_file(entries, self.rdap.base_url))
        build_mmdb(self._mmdb, dict(PLACES))

    async def stop(self) -> None:
        await self.dns.stop()
        await self.rdap.stop()

    @property
    def rdap_paths(self) -> set[str]:
        """What was asked of the RDAP server and answered with a document."""
        return {path for path, status, _ in self.rdap.served if status == 200}

    def environment(self) -> dict[str, str]:
        """The settings under which a part asks these peers and nobody else."""
        host, port = self.dns.address
        return {
            "LOOKUP_NAMESERVERS": json.dumps([f"{host}:{port}"]),
            "LOOKUP_RDAP_BOOTSTRAP_DIR": str(self._bootstrap),
            "LOOKUP_RDAP_ALLOW_HTTP": "true",
            "LOOKUP_RDAP_REFRESH": "false",
            "LOOKUP_GEOIP_MMDB": str(self._mmdb),
            "LOOKUP_PROBE_ALLOW": json.dumps(["127.0.0.0/8", "::1/128"]),
        }


@asynccontextmanager
async def serving_peers(folder: Path) -> AsyncIterator[Served]:
    peers = Served(folder)
    await peers.start()
    try:
        yield peers
    finally:
        await peers.stop()
