"""Every parser of a raw answer, by its name: what a fact names in `parser` ("rdap/1") is found here, in its current version."""

from collections.abc import Mapping

from workers import geoip, ping, rdap, reverse_dns
from workers.lookup import Parser, Result

_ALL: tuple[Parser[Result], ...] = (geoip.MMDB, geoip.IP_API, ping.PARSER, rdap.PARSER, reverse_dns.PARSER)
PARSERS: Mapping[str, Parser[Result]] = {parser.name: parser for parser in _ALL}
