"""Errors as RFC 9457 problem+json that also carry `error`, the message, for clients of the older service."""

from collections.abc import Mapping
from http import HTTPStatus

import orjson
from aiohttp import web

TYPE_PREFIX = "urn:lookup:problem:"


def problem(
    status: int,
    code: str,
    message: str,
    *,
    headers: Mapping[str, str] | None = None,
    members: Mapping[str, object] | None = None,
) -> web.Response:
    """A response for a client to act on: `code` is stable, `message` is ours, never an exception's text.

    `members` are further ones of the problem object (RFC 9457 section 3.2).
    """
    body = {
        "type": TYPE_PREFIX + code,
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": message,
        "code": code,
        "error": message,
        **(members or {}),
    }
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/problem+json", headers=headers)


def problem_of(error: web.HTTPException) -> web.Response:
    """What aiohttp refuses by an exception, in our words."""
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return problem(405, "method_not_allowed", f"This address takes {allowed}.", headers={"Allow": allowed})
        case web.HTTPNotFound():
            return problem(404, "not_found", "There is nothing at this address.")
        case _:
            return problem(error.status, "bad_request", "The request cannot be understood.")
