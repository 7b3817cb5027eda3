"""What a request may ask for besides target and services."""

import math
from dataclasses import dataclass

TIMEOUT_INVALID = "timeoutSeconds must be a number greater than 0"


@dataclass(eq=False)
class InvalidOption(ValueError):  # noqa: N818 - a refusal in the domain's words
    """An option that makes no sense: `code` is stable, `message` is the public sentence."""

    code: str
    message: str

    def __str__(self) -> str:
        return self.message


def parse_timeout_s(value: object) -> float | None:
    """How long one attempt of a service may take, in seconds; None when nothing was asked for. Raises `InvalidOption` only.

    A service whose own setting is lower keeps it: a request may ask for less, never for more.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidOption("timeout_invalid", TIMEOUT_INVALID)
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidOption("timeout_invalid", TIMEOUT_INVALID)
    return seconds
