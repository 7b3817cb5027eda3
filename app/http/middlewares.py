"""What both applications do with every request: a request id, errors in our words, headers."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

from aiohttp import web
from uuid_utils.compat import uuid7

from app.http.problem import problem

BODY_BYTES_MAX = 65_536
BODY_TIMEOUT_S = 10.0
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
    except web.HTTPRequestEntityTooLarge:
        return problem(413, "body_too_large", f"The request body may have {BODY_BYTES_MAX} bytes at most.")
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return problem(405, "method_not_allowed", f"This address takes {allowed}.", headers={"Allow": allowed})
    except web.HTTPNotFound:
        return problem(404, "not_found", "There is nothing at this address.")
    except web.HTTPException as error:
        if error.status < 400:  # noqa: PLR2004 - a redirect is no problem
            raise
        return problem(error.status, "bad_request", "The request cannot be understood.")
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("Request %s failed.", request_id_of(request))
        return problem(500, "internal_error", "Something broke on our side. The service's log says more.")


@web.middleware
async def with_bounded_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Read the body here, within a time; `client_max_size` bounds its length, and compressed ones are not taken."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        return problem(415, "content_encoding", "Compressed request bodies are not taken.")
    if request.can_read_body:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                await request.read()
        except TimeoutError:
            return problem(408, "body_too_slow", "The request body took too long to arrive.")
    return await handler(request)
