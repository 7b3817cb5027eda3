"""Dead letters on the bus: how a message that cannot be handled is put aside, and what is written on it.

A reader puts it aside itself (`put_aside`), or the transport does when it has handed it out `DELIVERY_LIMIT` times. Either way
it waits in `DEAD_LETTERS` until the drain (`write_side/drain.py`) has put it into the table.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

from events.bus import DEAD_LETTERS, Bus, Delivery, Queue

QUEUE = "dead-letter-queue"
REASON = "dead-letter-reason"
MESSAGE = "dead-letter-message"
ITEM = "dead-letter-item"
DELIVERIES = "dead-letter-deliveries"
DIED_AT = "dead-letter-died-at"
DIED_IN = "x-first-death-queue"
"""RabbitMQ's own word for it, on what it gave up on itself."""
_OURS = (QUEUE, REASON, MESSAGE, ITEM, DELIVERIES, DIED_AT)
_TRANSPORTS = ("x-", "correlation_id", "message_id", "reply_to")


class Reason(StrEnum):
    """Why a message was put aside: a stable code."""

    UNPARSABLE = "unparsable"
    WRONG_SCHEMA = "wrong_schema"
    DELIVERED_TOO_OFTEN = "delivered_too_often"
    REFUSED = "refused"
    UNKNOWN = "unknown"


SENTENCES: Mapping[Reason, str] = {
    Reason.UNPARSABLE: "It is no JSON.",
    Reason.WRONG_SCHEMA: "It is JSON, but not what this version of the program reads from its queue.",
    Reason.DELIVERED_TOO_OFTEN: "It was handed out again and again, and whoever took it never came to an end with it.",
    Reason.REFUSED: "It can be read, but to handle it breaks the program.",
    Reason.UNKNOWN: "Nobody wrote down why.",
}


async def put_aside(
    bus: Bus, queue: Queue, delivery: Delivery, body: bytes, reason: Reason, *, at: datetime, item: int = 0
) -> None:
    """Publish `body`, the n-th item of a delivery of `queue`, to the dead letters. Raises `BusUnavailable`.

    Acknowledge the delivery only afterwards: if it is put aside twice then, the drain sees that it is the same.
    """
    await bus.publish(DEAD_LETTERS, body, letter_headers(queue.name, delivery, reason, at=at, item=item))


def letter_headers(
    queue_name: str, delivery: Delivery, reason: Reason, *, at: datetime | None = None, item: int = 0
) -> dict[str, str]:
    """What is written on a dead letter. Without `at` it died when the drain gets to see it."""
    written = {
        QUEUE: queue_name,
        REASON: reason.value,
        MESSAGE: delivery.message_id,
        ITEM: str(item),
        DELIVERIES: str(delivery.delivery_count),
        **({} if at is None else {DIED_AT: at.isoformat()}),
    }
    return own_headers(delivery.headers) | written


def own_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a message was first published with: without the transport's, and without those of its death."""
    return {name: value for name, value in headers.items() if name not in _OURS and not name.startswith(_TRANSPORTS)}
