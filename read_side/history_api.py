"""The routes to a job's past: `?asOf=` on its document, `/history` and `/why`. They alone need PostgreSQL."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
from aiohttp import web

from events.facts import Fact, ResultReference
from read_side.history import Entry, JobHistory, Unanswered
from read_side.moments import Moment, moment_of, position_of
from read_side.queries import Answer
from read_side.sentences import sentences_of
from read_side.why import Why, why

STATUS = {
    "as_of_invalid": 400,
    "as_of_ahead": 400,
    "page_invalid": 400,
    "path_invalid": 400,
    "path_unknown": 404,
    "job_not_found": 404,
    "job_not_yet": 404,
    "history_unavailable": 503,
}
"""What each refusal is in HTTP."""

PAGE = 100
PAGE_MAX = 500
RETRY_AFTER_S = 5
AS_OF_INVALID = "asOf must be a position (a whole number) or a time as in RFC 3339, like 2026-01-02T03:04:05Z"
PAGE_INVALID = f"after must be a position, and limit a number from 1 to {PAGE_MAX}"
PATH_MISSING = "Say which field: path is a JSON pointer (RFC 6901), like /results/RDAP/data/handle"
NOT_CONFIGURED = "This service was given no database to read history from (LOOKUP_DATABASE_READ_URL)."
EVIDENCE = (
    "attempt",
    "worker",
    "provider",
    "parser",
    "source",
    "observed_at",
    "duration_ms",
    "error",
    "until",
    "reason",
    "message",
    "result",
    "replaces",
    "raw",
    "raw_absent",
)
"""What of a fact is shown as the reason of a field, in this order."""

Problem = Callable[..., web.Response]


@dataclass(frozen=True)
class HistoryApi:
    """The routes over `history`; None = there is no database to ask."""

    history: JobHistory | None
    problem: Problem

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/lookup/{job_id}/history", self.get_history),
            web.get("/api/lookup/{job_id}/why", self.get_why),
        ]

    async def as_of(self, job_id: UUID, text: str) -> Answer:
        """The job's document as of a position or time. Raises `Unanswered`."""
        return await self._log().as_of(job_id, _moment(text))

    async def get_history(self, request: web.Request) -> web.Response:
        try:
            job_id = _job_id(request)
            after, limit = _page(request)
            entries = await self._log().entries(job_id)
        except Unanswered as unanswered:
            return self.refusal(unanswered)
        return _json(_history(job_id, entries, after, limit))

    async def get_why(self, request: web.Request) -> web.Response:
        try:
            job_id = _job_id(request)
            path, as_of = request.query.get("path"), request.query.get("asOf")
            if path is None:
                raise Unanswered("path_invalid", PATH_MISSING)
            history = self._log()
            story = await history.story(job_id, None if as_of is None else _moment(as_of))
            reason = why(story, path, history.fold)
        except Unanswered as unanswered:
            return self.refusal(unanswered)
        return _json(_explanation(job_id, reason, dict(_told(story.entries))))

    def refusal(self, unanswered: Unanswered) -> web.Response:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if unanswered.code == "history_unavailable" else None
        return self.problem(STATUS[unanswered.code], unanswered.code, unanswered.message, headers=headers)

    def _log(self) -> JobHistory:
        if self.history is None:
            raise Unanswered("history_unavailable", NOT_CONFIGURED)
        return self.history


# --- What is asked ----------------------------------------------------------------------------------------------------


def _job_id(request: web.Request) -> UUID:
    try:
        return UUID(request.match_info["job_id"])
    except ValueError:
        raise Unanswered("job_not_found", "Job not found") from None


def _moment(text: str) -> Moment:
    try:
        return moment_of(text)
    except ValueError:
        raise Unanswered("as_of_invalid", AS_OF_INVALID) from None


def _page(request: web.Request) -> tuple[int, int]:
    """Behind which position, and how many."""
    try:
        after, limit = position_of(request.query.get("after", "0")), position_of(request.query.get("limit", str(PAGE)))
    except ValueError:
        raise Unanswered("page_invalid", PAGE_INVALID) from None
    if not 0 < limit <= PAGE_MAX:
        raise Unanswered("page_invalid", PAGE_INVALID)
    return after, limit


# --- What is told -----------------------------------------------------------------------------------------------------


def _history(job_id: UUID, entries: Sequence[Entry], after: int, limit: int) -> dict[str, Any]:
    behind = [(position, told) for position, told in _told(entries) if position > after]
    last = behind[:limit][-1][0] if behind else after
    more = f"/api/lookup/{job_id}/history?after={last}&limit={limit}" if len(behind) > limit else None
    return {"jobId": job_id, "facts": [told for _, told in behind[:limit]], "next": more}


def _told(entries: Sequence[Entry]) -> list[tuple[int, dict[str, Any]]]:
    """Each fact by its position: a sentence, and everything of its envelope."""
    sentences = sentences_of(entry.fact for entry in entries)
    return [(entry.position, _fact(entry, sentence)) for entry, sentence in zip(entries, sentences, strict=True)]


def _fact(entry: Entry, sentence: str) -> dict[str, Any]:
    envelope = entry.envelope
    name, _, schema_version = entry.stored.topic.removeprefix("lookup.").rpartition(".v")
    return {
        "position": entry.position,
        "recordedAt": entry.recorded_at,
        "type": name,
        "sentence": sentence,
        "actor": envelope.get("actor"),
        "reason": envelope.get("reason"),
        "correlationId": envelope.get("correlation_id"),
        "causationId": envelope.get("causation_id"),
        "requestId": envelope.get("request_id"),
        "keyId": envelope.get("key_id"),
        "traceparent": envelope.get("traceparent"),
        "eventId": envelope.get("event_id"),
        "streamId": entry.stored.stream_id,
        "version": entry.stored.stream_version,
        "schemaVersion": int(schema_version),
        "hash": entry.hash,
    }


def _explanation(job_id: UUID, reason: Why, told: dict[int, dict[str, Any]]) -> dict[str, Any]:
    fact = told[reason.entry.position]
    return {
        "jobId": job_id,
        "path": reason.path,
        "value": reason.value,
        "because": fact["sentence"],
        "service": reason.service,
        **({} if reason.answer is None else _evidence(reason.answer.fact)),
        **_evidence(reason.entry.fact),
        "fact": fact,
        **({} if reason.answer is None else {"answer": told[reason.answer.position]}),
        "dispatch": None if reason.dispatch is None else told[reason.dispatch.position],
    }


def _evidence(fact: Fact) -> dict[str, Any]:
    """What the fact itself says of how it came about; what it does not know is left out."""
    known = {name: getattr(fact, name, None) for name in EVIDENCE}
    return {_camel(name): _plain(value) for name, value in known.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, ResultReference):
        return {"sha256": value.sha256, "sizeBytes": value.size_bytes}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _camel(name: str) -> str:
    first, *more = name.split("_")
    return first + "".join(word.capitalize() for word in more)


def _json(body: dict[str, Any]) -> web.Response:
    headers = {"Cache-Control": "no-cache"}
    return web.Response(body=orjson.dumps(body, option=orjson.OPT_UTC_Z), content_type="application/json", headers=headers)
