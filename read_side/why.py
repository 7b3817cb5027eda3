"""Why does a job's document say this? The fact behind any of its fields, named by a JSON pointer (RFC 6901).

Where the pointer goes into `results`, a service's name stands for its place in the list.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from events.facts import Fact, JobFact, ResultCorrected, Service, TaskCompleted, TasksDispatched
from projections.views import JobStatus, document_of
from read_side.history import Entry, Fold, Story, Unanswered

POINTER_CHARS_MAX = 1_000
EVERYWHERE = 20_000
"""So many values are looked at for a shorthand, at most."""

_INDEX = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_BAD_ESCAPE = re.compile(r"~(?![01])")

Tokens = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Why:
    """The fact behind a field, and where the field was found.

    Of a service's field: `dispatch` is what had asked the service, `answer` what a correction reads again.
    """

    path: str
    value: Any
    entry: Entry
    service: Service | None = None
    dispatch: Entry | None = None
    answer: Entry | None = None


def why(story: Story, pointer: str, fold: Fold) -> Why:
    """Which fact made a field so. Raises `Unanswered` with `path_invalid` or `path_unknown`."""
    tokens = parse_pointer(pointer)
    document = _by_service(orjson.loads(story.document))
    tokens = _found(document, _by_name(tokens, story.status))
    path, value = written(tokens), value_at(document, tokens)
    entry = _origin(story, tokens, fold)
    if len(tokens) < 2 or tokens[0] != "results":  # noqa: PLR2004 - `results`, and whose
        return Why(path, value, entry)
    service = Service(tokens[1])
    about = [past for past in story.entries if past.position <= entry.position and service in services_of(past.fact)]
    answer = _last(about, TaskCompleted) if isinstance(entry.fact, ResultCorrected) else None
    return Why(path, value, entry, service, _last(about, TasksDispatched), answer)


# --- Pointers ---------------------------------------------------------------------------------------------------------


def parse_pointer(text: str) -> Tokens:
    """The reference tokens of a JSON pointer (RFC 6901 section 3)."""
    if len(text) > POINTER_CHARS_MAX or (text and not text.startswith("/")) or _BAD_ESCAPE.search(text):
        message = "path must be a JSON pointer (RFC 6901) of at most 1000 characters, like /results/RDAP/data/handle"
        raise Unanswered("path_invalid", message)
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in text.split("/")[1:])


def written(tokens: Tokens) -> str:
    return "".join(f"/{token.replace('~', '~0').replace('/', '~1')}" for token in tokens)


def value_at(document: Any, tokens: Tokens) -> Any:
    """The value that these tokens lead to (RFC 6901 section 4)."""
    value = document
    for token in tokens:
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and _INDEX.fullmatch(token) and int(token) < len(value):
            value = value[int(token)]
        else:
            raise Unanswered("path_unknown", "The job's document has nothing at this path.")
    return value


def _by_service(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"results": {result["serviceType"]: result for result in document["results"]}}


def _by_name(tokens: Tokens, status: JobStatus) -> Tokens:
    """A place in the list of results is as good as its service's name."""
    if tokens[:1] != ("results",) or len(tokens) == 1 or not _INDEX.fullmatch(tokens[1]):
        return tokens
    at = int(tokens[1])
    return (tokens[0], status.services[at], *tokens[2:]) if at < len(status.services) else tokens


def _found(document: dict[str, Any], tokens: Tokens) -> Tokens:
    """The tokens; or where the one name that they end in is found below a service's `data`, if it is not right there.

    People say /results/RDAP/data/registrar and mean /results/RDAP/data/domain/registrar.
    """
    try:
        value_at(document, tokens)
    except Unanswered:
        if len(tokens) != 4 or tokens[0] != "results" or tokens[2] != "data":  # noqa: PLR2004 - the shape named above
            raise
        deeper = _nearest(value_at(document, tokens[:3]), tokens[3])
        if deeper is None:
            raise
        return tokens[:3] + deeper
    return tokens


def _nearest(value: Any, name: str) -> Tokens | None:
    """The way to the one member of this name that is nearest; None when there is none, or more than one as near."""
    level: list[tuple[Tokens, Any]] = [((), value)]
    looked_at = 0
    while level and looked_at < EVERYWHERE:
        looked_at += len(level)
        members = [((*way, key), below) for way, above in level if isinstance(above, dict) for key, below in above.items()]
        found = [way for way, _ in members if way[-1] == name]
        if found:
            return found[0] if len(found) == 1 else None
        level = members
    return None


# --- Origins ----------------------------------------------------------------------------------------------------------


def _origin(story: Story, tokens: Tokens, fold: Fold) -> Entry:
    """The last fact that changed the field; of a service's part, the last that was about it."""
    found = story.entries[0]
    documents = dict.fromkeys(story.documents, b"null")
    service = Service(tokens[1]) if tokens[:1] == ("results",) and len(tokens) > 1 else None
    status: JobStatus | None = None
    before: object = None
    for entry in story.entries:
        fact = cast("JobFact", entry.fact)
        status = fold(status, fact)
        if isinstance(fact, ResultCorrected) and tokens[2:3] not in {(), ("data",)}:
            continue  # It stands in for the data of an answer, and for nothing else.
        now = status.tasks[service] if service else _field(status, tokens, documents)
        if now != before or (service is not None and service in services_of(fact)):
            found, before = entry, now
    return found


def _field(status: JobStatus, tokens: Tokens, documents: Mapping[str, bytes]) -> object:
    """What has to change for the field to change: its member of the document, or the whole."""
    document = orjson.loads(document_of(status, documents))
    return document[tokens[0]] if tokens else document


def services_of(fact: Fact) -> Sequence[Service]:
    """The services whose tasks a fact is about."""
    if isinstance(fact, TasksDispatched):
        return [task.service for task in fact.tasks]
    service: Service | None = getattr(fact, "service", None)
    return [] if service is None else [service]


def _last(entries: Sequence[Entry], kind: type[Fact]) -> Entry | None:
    return next((entry for entry in reversed(entries) if isinstance(entry.fact, kind)), None)
