"""Builds small MMDB files of the common kinds. Run as a script it writes the one that ships with the demo."""

from pathlib import Path
from typing import Any

from mmdb_writer import MMDBWriter
from netaddr import IPSet

from app.demo.peers import DEMO_MMDB

DEMO_CITY: dict[str, Any] = {
    "city": {"names": {"en": "Loopback City"}},
    "country": {"iso_code": "NL", "names": {"en": "Netherlands"}},
    "location": {"latitude": 52.37, "longitude": 4.89, "time_zone": "Europe/Amsterdam"},
    "postal": {"code": "1012"},
    "subdivisions": [{"iso_code": "NH", "names": {"en": "North Holland"}}, {"iso_code": "AMS", "names": {"en": "Amsterdam"}}],
    "traits": {
        "autonomous_system_number": 64500,
        "autonomous_system_organization": "Demo Networks",
        "isp": "Demo Access B.V.",
        "organization": "Demo Hosting",
    },
}
DEMO_NETWORKS = ["127.0.0.0/8", "::1/128", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32"]


def build_mmdb(path: Path, records: dict[str, Any], database_type: str = "Demo-City", ip_version: int = 6) -> Path:
    """`records` by network, as in `{"192.0.2.0/24": {"country": ...}}`."""
    writer = MMDBWriter(ip_version=ip_version, database_type=database_type, ipv4_compatible=ip_version == 6, languages=["en"])
    for network, record in records.items():
        writer.insert_network(IPSet([network]), record)
    writer.to_db_file(str(path))
    return path


if __name__ == "__main__":
    build_mmdb(DEMO_MMDB, dict.fromkeys(DEMO_NETWORKS, DEMO_CITY))
