"""Positions and times as clients write them."""

import re
from datetime import UTC, datetime

POSITION_MAX = 2**63 - 1
Moment = int | datetime
"""A position, or an aware time: what was recorded up to then had happened."""

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:[Zz]|([+ -])(\d\d:\d\d))", re.ASCII)


def position_of(text: str) -> int:
    """A position in decimal digits. Raises `ValueError` for anything else, and for more than the log's type holds."""
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(POSITION_MAX)) or int(text) > POSITION_MAX:
        raise ValueError(text)
    return int(text)


def moment_of(text: str) -> Moment:
    """A position, or a time as in RFC 3339 section 5.6. Raises `ValueError`.

    A `+` that was not escaped in an address arrives as a space, and is taken for what it was.
    """
    written = _TIME.fullmatch(text)
    if written is None:
        return position_of(text)
    date, time, sign, offset = written.groups()
    zone = f"{'-' if sign == '-' else '+'}{offset}" if offset else "+00:00"
    try:
        return datetime.fromisoformat(f"{date}T{time}{zone}").astimezone(UTC)
    except OverflowError:
        raise ValueError(text) from None
