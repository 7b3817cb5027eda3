"""The hash chain: each fact vouches for all earlier facts of its stream, and the head of the log for all facts."""

from hashlib import sha256
from uuid import UUID

GENESIS = bytes(32)
"""The previous hash of a stream's first fact, and the head of an empty log."""


def chained_hash(previous: bytes, stream_id: UUID, stream_version: int, topic: str, envelope: bytes, chained: bytes) -> bytes:
    """SHA-256 over the previous hash of the stream and everything of the fact that is never erased.

    Variable parts are preceded by their length, so that no byte can move from one part to the next unseen. The topic
    names the schema version.
    """
    hasher = sha256(previous)
    hasher.update(stream_id.bytes)
    hasher.update(stream_version.to_bytes(8, "big"))
    for part in (topic.encode(), envelope, chained):
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.digest()


def next_head(head: bytes, position: int, fact_hash: bytes) -> bytes:
    """The head of the log after one more fact: a running hash over (position, fact hash)."""
    return sha256(head + position.to_bytes(8, "big") + fact_hash).digest()
