"""One client's connection: what aiohttp's own lacks to be safe in the open.

- **A request arrives in time** or is refused: `ARRIVAL_MAX_S` from its first byte to the last one of its body, and the answer
  leaves in time or the connection ends. Who sends or takes a byte now and then holds nothing up for longer.
- **Refused in our words.** What is not HTTP never reaches an application; it is answered with problem+json here.
- **Never unpacked.** A compressed body arrives as it is, and `with_bounded_body` refuses it: there is no bomb to be set off.
"""

import asyncio
import logging

from aiohttp import EMPTY_PAYLOAD, HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import _ErrInfo
from uuid_utils.compat import uuid7

from app.http.problem import problem

ARRIVAL_MAX_S = 4.0
LEAVING_MAX_S = 30.0
IDLE_MAX_S = 75.0
"""Longer than a gateway keeps an unused connection, so that it never sends on one that we are just closing."""
LINGER_S = 0.5
"""How long what is still being sent is read and dropped after an early answer, so that the client gets to read the answer."""
HEAD_LINE_BYTES_MAX = 8_190
HEADERS_MAX = 128
SPOKEN = {HttpVersion10, HttpVersion11}

NOT_HTTP = "This is not a valid HTTP request."
HEAD_TOO_LARGE = (
    f"The address and each header may have {HEAD_LINE_BYTES_MAX} bytes at most, and a request {HEADERS_MAX} headers at most."
)
TOO_SLOW = "The request took too long to arrive."
BROKEN_OFF = "The request body does not end as its headers say."

log = logging.getLogger(__name__)


class TooSlow(HttpProcessingError):  # noqa: N818 - what is the case, in our words
    """The request has not arrived in time."""


class UnknownExpectation(HttpProcessingError):  # noqa: N818 - what is the case, in our words
    """The client expects something that this server has not heard of."""


class Connection(web.RequestHandler):
    """Answers one client's requests, one after the other. `arrives_by` is the loop's time until which the newest may arrive."""

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # None is how AppRunner says it: no log of each request
            keepalive_timeout=IDLE_MAX_S,
            lingering_time=LINGER_S,
            max_line_size=HEAD_LINE_BYTES_MAX,
            max_field_size=HEAD_LINE_BYTES_MAX,
            max_headers=HEADERS_MAX,
            auto_decompress=False,
        )
        self.arrives_by = 0.0
        self._body: StreamReader = EMPTY_PAYLOAD
        self._answered: StreamReader | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if data and self._head_timer is None and self._body.is_eof():
            self.arrives_by = self._loop.time() + ARRIVAL_MAX_S
            self._head_timer = self._loop.call_at(self.arrives_by, self._give_up)
        count, body = self._request_count, self._body
        try:
            super().data_received(data)
        except Exception:  # noqa: BLE001 - whatever the parser stumbles over, it is the client's doing
            self._queue_refusal(HttpProcessingError())
        if self._request_count == count:
            return
        self._stop_timer()
        self._refuse_odd_heads(self._request_count - count)
        newest, self._body = self._messages[-1]
        if isinstance(newest, _ErrInfo) and not body.is_eof():
            self._break_off(body)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        self._answered = request.content
        try:
            async with asyncio.timeout(LEAVING_MAX_S):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            if self.transport is not None:
                # Closing would wait for the client to take the rest, which is what it does not do.
                self.transport.abort()
            self.force_close()
            return resp, True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002 - the exception says more
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - we have words of our own
    ) -> web.StreamResponse:
        """The answer to what no application has seen. Nobody hears of it but the client: anybody can send anything."""
        if request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionError("There is nobody to be answered, or half of an answer has left already.") from exc
        response = _told_apart(_refusal_of(exc))
        response.force_close()
        return response

    def _break_off(self, body: StreamReader) -> None:
        """The parser stumbled inside a body. It tells the next request, but nobody who waits for this one's end."""
        if body is self._answered:
            # Only dropped by now, which an exception would end with a traceback.
            self.close()
        else:
            body.set_exception(web.RequestPayloadError(BROKEN_OFF))
        body.feed_eof()

    def _give_up(self) -> None:
        self._head_timer = None
        self._queue_refusal(TooSlow())

    def _refuse_odd_heads(self, new: int) -> None:
        """What the parser lets through, but nobody behind it expects: an answer in HTTP/9.9, a host that is no name."""
        for index in range(len(self._messages) - new, len(self._messages)):
            message, _ = self._messages[index]
            if isinstance(message, _ErrInfo):
                continue
            if message.version not in SPOKEN or not _names_a_host(message):
                self._messages[index] = _refusal(HttpProcessingError())
            elif message.headers.get("Expect", "100-continue").lower() != "100-continue":
                self._messages[index] = _refusal(UnknownExpectation())

    def _queue_refusal(self, error: HttpProcessingError) -> None:
        """As the parser's refusals are, so that answers keep their order."""
        self._messages.append(_refusal(error))
        self._request_count += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _names_a_host(message: RawRequestMessage) -> bool:
    """False for `http://xn--/` and its like: aiohttp would raise on it where nobody answers the client."""
    try:
        return not message.url.absolute or message.url.host is not None
    except ValueError:
        return False


def _refusal(error: HttpProcessingError) -> tuple[_ErrInfo, StreamReader]:
    """In the place of a request; `handle_error` finds the words for it."""
    return _ErrInfo(error.code, error, error.message), EMPTY_PAYLOAD


def _refusal_of(error: BaseException | None) -> web.Response:
    match error:
        case TooSlow():
            return problem(408, "request_too_slow", TOO_SLOW)
        case UnknownExpectation():
            return problem(417, "expectation_failed", "Of `Expect`, only `100-continue` is understood.")
        case LineTooLong():
            return problem(431, "head_too_large", HEAD_TOO_LARGE)
        case HttpProcessingError():
            return problem(400, "not_http", NOT_HTTP)
        case _:
            log.error("A request failed outside of the application.", exc_info=error)
            return problem(500, "internal_error", "Something broke on our side. The service's log says more.")


def _told_apart(response: web.Response) -> web.Response:
    """With the headers that every answer has."""
    response.headers["X-Request-Id"] = str(uuid7())
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
