"""One row of the log: is it what was recorded?"""

from collections.abc import Sequence

import orjson

from events.chain import chained_hash
from events.record import StoredFact, digest

WHOLE, ERASED = 5, 3
"""So many lines has a fact with erasable values, and one without, or whose values were erased."""


def fault_of(stored: StoredFact, previous: bytes) -> str | None:
    """What is wrong with a row whose stream had come to the hash `previous`, in a sentence; None when nothing is."""
    lines = stored.state.split(b"\n")
    if len(lines) not in {ERASED, WHOLE}:
        return f"It has {len(lines)} lines, which no fact has."
    hashed = chained_hash(previous, stored.stream_id, stored.stream_version, stored.topic, lines[0], lines[1])
    if hashed.hex().encode() != lines[2]:
        return f"Version {stored.stream_version} is not what was recorded, or does not follow what was there before."
    if len(lines) == WHOLE and not _are_vouched_for(lines):
        return "Its erasable values are not those that were recorded."
    return None


def told_hash(stored: StoredFact) -> bytes:
    """The hash that lies with a fact, right or wrong; empty where there is none."""
    try:
        return bytes.fromhex(stored.state.split(b"\n")[2].decode())
    except (IndexError, ValueError):
        return b""


def _are_vouched_for(lines: Sequence[bytes]) -> bool:
    """The chain holds a digest of each erasable value. One that was erased has left nothing behind, its salt neither."""
    try:
        digests = orjson.loads(lines[0])["erasable"]
        salts, values = orjson.loads(lines[3]), orjson.loads(lines[4])
        # What is said twice, or in another spelling, was not written by us.
        if orjson.dumps(salts) != lines[3] or orjson.dumps(values) != lines[4] or salts.keys() != values.keys():
            return False
        if any(bytes.fromhex(salt).hex() != salt for salt in salts.values()):
            return False
        told = {
            name: digest(bytes.fromhex(salts[name]), orjson.dumps(value, option=orjson.OPT_SORT_KEYS))
            for name, value in values.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(told) and all(digests.get(name) == value for name, value in told.items())
