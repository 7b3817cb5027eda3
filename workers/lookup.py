"""What a lookup is given and how it may end: the words that the runner and the four lookups share."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from events.facts import DeferReason, Target


class Result(BaseModel):
    """The document that a lookup brings. Field names are camelCase in JSON; what is unknown is null."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, serialize_by_alias=True)


@dataclass(eq=False)
class LookupFailed(Exception):  # noqa: N818 - an outcome in the domain's words
    """The lookup has no answer: `code` is stable, `message` is ours, `transient` says that another try may help."""

    code: str
    message: str
    transient: bool = False

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class LookupDeferred(Exception):  # noqa: N818 - an outcome in the domain's words
    """The lookup may not ask now; try again in `retry_after_s` seconds. No attempt is used up."""

    reason: DeferReason
    retry_after_s: float


LookUp = Callable[[Target], Awaitable[Result]]
"""A lookup with its network already bound: target in, result out, or `LookupFailed` / `LookupDeferred`."""
