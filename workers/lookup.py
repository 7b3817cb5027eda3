"""What a lookup is given and how it may end: the words that the runner and the four lookups share.

Asking and reading are two steps. What a provider said is kept as it was received (`RawAnswer`), and a `Parser` makes the result
of it: a pure function, so that an answer of long ago can be read again by a better parser, without asking anybody.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from events.facts import DeferReason, Target


class Result(BaseModel):
    """The document that a lookup brings. Field names are camelCase in JSON; what is unknown is null."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, serialize_by_alias=True)


Brought_co = TypeVar("Brought_co", bound=Result, covariant=True)


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What a provider said, as it was received, and what else must be known to read it (`about`: plain JSON values).

    It lies in the store as `about` in one line of JSON, a line feed, and the body.
    """

    about: Mapping[str, Any]
    body: bytes

    def stored(self) -> bytes:
        return orjson.dumps(self.about, option=orjson.OPT_UTC_Z) + b"\n" + self.body

    @classmethod
    def of(cls, stored: bytes) -> "RawAnswer":
        about, _, body = stored.partition(b"\n")
        return cls(orjson.loads(about), body)


@dataclass(frozen=True, slots=True)
class Answer(Generic[Brought_co]):
    """A result, and how it came about: who answered, what read it, and what was said. None = there is nothing to tell."""

    result: Brought_co
    provider: str | None = None
    parser: str | None = None
    raw: RawAnswer | None = None


@dataclass(frozen=True, slots=True)
class Parser(Generic[Brought_co]):
    """Reads one kind of raw answer. Whoever changes what `parse` makes of any answer raises `version`.

    `parse` is pure: no network, no clock, no settings. It raises `LookupFailed` for an answer that makes no sense.
    """

    name: str
    version: int
    parse: Callable[[RawAnswer], Brought_co]

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    def read(self, raw: RawAnswer, provider: str) -> Answer[Brought_co]:
        return Answer(self.parse(raw), provider, str(self), raw)


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


LookUp = Callable[[Target], Awaitable[Answer[Result]]]
"""A lookup with its network already bound: target in, answer out, or `LookupFailed` / `LookupDeferred`."""
