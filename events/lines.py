"""Messages of one JSON object a line: split without being parsed, each item read on its own, a bad one put aside alone."""

import logging
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from events.bus import DEAD_LETTERS, Bus, Delivery, Queue

Item = TypeVar("Item", bound=BaseModel)

log = logging.getLogger(__name__)


async def read_items(model: type[Item], delivery: Delivery, queue: Queue, bus: Bus) -> tuple[list[Item], int]:
    """The items of a message of `queue`, and how many lines were none: those go to the dead letters.

    Raises `BusUnavailable` when one cannot be put aside; then nothing of the message may be acknowledged.
    """
    items: list[Item] = []
    unreadable = 0
    for line in delivery.body.split(b"\n"):
        try:
            items.append(model.model_validate_json(line))
        except ValidationError:
            unreadable += 1
            log.warning("An item of %s cannot be read; it goes to the dead letters.", queue.name)
            await bus.publish(DEAD_LETTERS, line, {"queue": queue.name, "reason": "unreadable"})
    return items, unreadable
