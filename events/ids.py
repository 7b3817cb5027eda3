"""What an id tells of itself."""

from uuid import UUID

_OF_TIME = 7


def made_at_ms(made: UUID) -> int | None:
    """The Unix time in ms that a UUIDv7 carries in its first 48 bits (RFC 9562 section 5.7); None for any other id."""
    return made.int >> 80 if made.version == _OF_TIME else None
