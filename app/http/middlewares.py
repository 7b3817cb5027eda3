"""What both applications do with every request: a request id, errors in our words, headers."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

from aiohttp import web
from uuid_utils.compat import uuid7

from app.http.connection import BROKEN_OFF, Connection
from app.http.problem import problem, problem_of

BODY_BYTES_MAX = 65_536
BODY_TOO_LARGE = f"The request body may have {BODY_BYTES_MAX} bytes at most."
NOT_JSON = "The request body must be JSON and be called so. With curl, add: -H 'Content-Type: application/json'"
REQUEST_ID = web.RequestKey("request_id", str)
_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)


def request_id_of(request: web.Request) -> str | None:
    return request.get(REQUEST_ID)


@web.middleware
async def with_request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep a caller's well-formed X-Request-Id, or make one; every answer tells it."""
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _WELL_FORMED.fullmatch(given) else str(uuid7())
    response = await handler(request)
    response.headers["X-Request-Id"] = request[REQUEST_ID]
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


@web.middleware
async def with_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error leaves as problem+json in our own words."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:  # noqa: PLR2004 - a redirect is no problem
            raise
        return problem_of(error)
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("Request %s failed.", request_id_of(request))
        return problem(500, "internal_error", "Something broke on our side. The service's log says more.")


@web.middleware
async def with_bounded_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Read the body here: JSON as it is, so long at most, and whole within the time that its connection gives it."""
    if request.match_info.http_exception is not None or not _has_a_body(request):
        return await handler(request)
    refusal = _refusal_of_body(request)
    if refusal is not None:
        return refusal
    protocol = request.protocol
    assert isinstance(protocol, Connection)
    try:
        async with asyncio.timeout_at(protocol.arrives_by):
            await request.read()
    except web.HTTPRequestEntityTooLarge:
        return problem(413, "body_too_large", BODY_TOO_LARGE)
    except TimeoutError:
        return problem(408, "body_too_slow", "The request body took too long to arrive.")
    except web.RequestPayloadError:
        refusal = problem(400, "body_broken_off", BROKEN_OFF)
        refusal.force_close()
        return refusal
    return await handler(request)


def _has_a_body(request: web.Request) -> bool:
    """True also of one that is known to be broken already: `can_read_body` alone takes it for one that was read to its end."""
    return request.can_read_body or request.content.exception() is not None


def _refusal_of_body(request: web.Request) -> web.Response | None:
    """What the headers say is reason enough: nothing of the body is read, let alone unpacked."""
    if any(encoding.strip().lower() != "identity" for encoding in request.headers.getall("Content-Encoding", ())):
        return problem(415, "content_encoding", "Compressed request bodies are not taken.")
    if (request.content_length or 0) > BODY_BYTES_MAX:
        return problem(413, "body_too_large", BODY_TOO_LARGE)
    if not _may_be_json(request.headers.get("Content-Type", "")):
        return problem(415, "content_type", NOT_JSON)
    return None


def _may_be_json(content_type: str) -> bool:
    """JSON, or nothing said, which application/octet-stream is another word for (RFC 9110 section 8.3).

    What a web page can send across origins without being asked (a form, plain text) is not taken.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type in {"", "application/json", "application/octet-stream"} or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
