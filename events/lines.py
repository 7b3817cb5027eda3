"""Messages of one JSON object a line: split without being parsed, each item read on its own, a bad one put aside alone."""

import logging
from datetime import datetime
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from events.bus import Bus, Delivery, Queue
from events.dead_letters import Reason, put_aside

Item = TypeVar("Item", bound=BaseModel)

log = logging.getLogger(__name__)


async def read_items(model: type[Item], delivery: Delivery, queue: Queue, bus: Bus, *, now: datetime) -> tuple[list[Item], int]:
    """The items of a message of `queue`, and how many lines were none: those go to the dead letters.

    Raises `BusUnavailable` when one cannot be put aside; then nothing of the message may be acknowledged.
    """
    items: list[Item] = []
    unreadable = 0
    for number, line in enumerate(delivery.body.split(b"\n")):
        try:
            items.append(model.model_validate_json(line))
        except ValidationError as error:
            unreadable += 1
            log.warning("An item of %s cannot be read; it goes to the dead letters.", queue.name)
            await put_aside(bus, queue, delivery, line, _reason_of(error), at=now, item=number)
    return items, unreadable


def _reason_of(error: ValidationError) -> Reason:
    is_json = all(finding["type"] != "json_invalid" for finding in error.errors(include_url=False, include_input=False))
    return Reason.WRONG_SCHEMA if is_json else Reason.UNPARSABLE
