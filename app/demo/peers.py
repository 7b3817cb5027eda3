"""The local peers of `make demo` and of the tests: everything that the four lookups ask, on loopback, without internet."""

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

from app.demo.dns_server import DnsServer
from app.demo.ip_api import IpApi
from app.demo.rdap_server import RdapServer
from domain.address_policy import AddressPolicy
from workers.network import NetworkSettings

DEMO_MMDB = Path(__file__).parent / "demo.mmdb"
"""Made-up City and ASN data for 127.0.0.0/8, ::1 and the documentation networks; built by `tests/peers/mmdb.py`."""

DEMO_TLDS = ["com", "org", "net", "de", "fr", "nl", "uk", "eu", "io", "dev", "info"]
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


@dataclass(frozen=True)
class DemoPeers:
    """Running peers, and the settings under which the lookups ask them. Ended by `stop`."""

    rdap: RdapServer
    dns: DnsServer
    ip_api: IpApi
    settings: NetworkSettings

    async def stop(self) -> None:
        for peer in (self.rdap, self.dns, self.ip_api):
            await peer.stop()


async def start_demo_peers(data_dir: Path) -> DemoPeers:
    """Starts the peers on free ports of 127.0.0.1 and writes RDAP bootstrap files that lead to them below `data_dir`."""
    rdap, dns, ip_api = RdapServer(), DnsServer(), IpApi()
    for peer in (rdap, dns, ip_api):
        await peer.start()
    settings = NetworkSettings(
        policy=AddressPolicy(allowed_networks=LOOPBACK),
        nameservers=(dns.address,),
        geoip_mmdb=DEMO_MMDB,
        ip_api_url=ip_api.url,
        rdap_bootstrap_dir=_write_bootstrap(data_dir / "rdap_bootstrap", rdap.base_url),
        rdap_refresh=False,
        rdap_allow_http=True,
    )
    return DemoPeers(rdap, dns, ip_api, settings)


def bootstrap_file(entries: list[str], base_url: str) -> bytes:
    """In the format of RFC 9224 section 3."""
    document = {"version": "1.0", "publication": "2025-01-01T00:00:00Z", "services": [[entries, [base_url]]]}
    return json.dumps(document).encode()


def _write_bootstrap(directory: Path, base_url: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for kind, entries in {"ipv4": ["0.0.0.0/0"], "ipv6": ["::/0"], "dns": DEMO_TLDS}.items():
        (directory / f"{kind}.json").write_bytes(bootstrap_file(entries, base_url))
    return directory
