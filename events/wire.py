"""How facts travel: a stretch of the log as a CloudEvents 1.0 JSON batch (`application/cloudevents-batch+json`).

The headers name the stretch: `previous_position` (exclusive) and `position` (inclusive) of the log `log_id`. A reader that has
seen everything up to `previous_position` or later may fold it; one that has not has missed something and reads the log instead.
A stretch of another log is none of its business: after a restore, the broker may still hold what the lost log told.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from events.catalog import FACTS, TOPICS, fact_type, upcast
from events.record import Recorded, StoredFact, envelope_of, fact_of, hash_of, whole_fact

CONTENT_TYPE = "application/cloudevents-batch+json"


def cloud_events(stretch: Sequence[StoredFact], source: str) -> bytes:
    """The batch of a stretch. The log's JSON is spliced in as it lies there: nothing is parsed that need not be."""
    return b"[" + b",\n".join(_cloud_event(stored, source) for stored in stretch) + b"]"


def stretch_headers(previous_position: int, position: int, log_id: str | None = None) -> dict[str, str]:
    headers = {"content-type": CONTENT_TYPE, "previous_position": str(previous_position), "position": str(position)}
    return headers if log_id is None else headers | {"log_id": log_id}


def stretch_of(headers: Mapping[str, str]) -> tuple[int, int]:
    """(previous_position, position) of a batch."""
    return int(headers["previous_position"]), int(headers["position"])


def is_of_log(headers: Mapping[str, str], log_id: str) -> bool:
    """Whether a batch is of this log. One that does not tell is an older program's, and is believed."""
    return headers.get("log_id", log_id) == log_id


def read_batch(body: bytes) -> list[Recorded]:
    """The facts of a batch, in position order. Raises `UnknownFact` or `ValueError` for one that we cannot read."""
    return [_recorded(event) for event in orjson.loads(body)]


def _recorded(event: Mapping[str, Any]) -> Recorded:
    # Back to bytes and then straight into the model: strict JSON rules apply, and it is faster than one large union type.
    # The relay sends current versions, but it may be an older relay than we are a reader.
    topic = event["type"]
    fact = fact_type(topic).model_validate_json(orjson.dumps(upcast(topic, event["data"])))
    return Recorded(
        int(event["sequence"]),
        UUID(event["subject"]),
        event["streamversion"],
        fact,
        event["facthash"],
        datetime.fromisoformat(event["time"]),
    )


def _cloud_event(stored: StoredFact, source: str) -> bytes:
    envelope = envelope_of(stored.state)
    topic, data = _current(stored)
    extensions = "".join(
        # Told to us by a client: spelled as JSON, lest it end its string and name another job.
        f',"{attribute}":{orjson.dumps(envelope[name]).decode()}'
        for attribute, name in (
            ("correlationid", "correlation_id"),
            ("causationid", "causation_id"),
            ("traceparent", "traceparent"),
        )
        if name in envelope
    )
    head = (
        f'{{"specversion":"1.0","id":"{envelope["event_id"]}","source":"{source}","type":"{topic}"'
        f',"subject":"{stored.stream_id}","time":"{envelope["recorded_at"]}","datacontenttype":"application/json"'
        f',"sequence":"{stored.position}","streamversion":{stored.stream_version},"facthash":"{hash_of(stored.state).hex()}"{extensions},"data":'
    )
    return head.encode() + data + b"}"


def _current(stored: StoredFact) -> tuple[str, bytes]:
    """A fact in its current version: subscribers see one version only, whatever the log holds."""
    if stored.topic in FACTS:
        return stored.topic, whole_fact(stored.topic, stored.state)
    fact = fact_of(stored.topic, stored.state)
    return TOPICS[type(fact)], fact.model_dump_json(exclude_none=True).encode()
