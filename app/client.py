"""What `lookup run` does: submit over HTTP, follow the job until it is closed, print what was gathered.

It knows the service by its HTTP contract alone, so it serves any deployment. The job is safe in the service from the moment
that it is accepted: whatever ends the client early, it says how to look again.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from uuid import UUID

import httpx
import orjson
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from app.rendering import JobView, job_report, progress, safe
from domain.options import InvalidOption, parse_timeout_s

CONNECT_TIMEOUT_S = 5.0
EXCHANGE_TIMEOUT_S = 15.0
BODY_BYTES_MAX = 16 * 1024 * 1024
POLL_MIN_S = 0.1
POLL_MAX_S = 2.0
POLL_GROWTH = 1.5
RETRY_AFTER_MAX_S = 5.0
LOST_POLLS_MAX = 12
"""So many polls in a row may be lost before the service counts as gone: about 15 s, enough for a restart."""

PORT_MAX = 65_535
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
REFUSED_INPUT = {400, 401, 403, 413, 415, 422}
BUSY = {429, 502, 503, 504}


class Exit(IntEnum):
    """What the command's exit status tells a script. `FAILED`: the job was closed without an answer, or cancelled."""

    COMPLETED = 0
    FAILED = 1
    BAD_INPUT = 2
    UNAVAILABLE = 3
    UNFINISHED = 4
    INTERRUPTED = 130


@dataclass
class Stopped(Exception):  # noqa: N818 - an ending, in the command's words
    """The command ends here, with this status and after saying this."""

    status: Exit
    message: str


@dataclass
class Seen:
    """What is known of the job so far, and its JSON document as it came."""

    job_id: UUID | None = None
    job: JobView | None = None
    document: bytes = b""


async def run(
    target: str,
    services: Sequence[str],
    *,
    base_url: str,
    as_json: bool,
    timeout_s: float,
    out: Console,
    err: Console,
    attempt_s: float | None = None,
) -> int:
    """Looks `target` up and prints the answer to `out`, everything else to `err`; gives the exit status (`Exit`).

    No `services` means all of them. `as_json` prints the service's JSON document and nothing beside it. `timeout_s` bounds
    the wait for the job, from its acceptance on; `attempt_s`, when given, each attempt of a service (`timeoutSeconds`).
    What is known by then is printed, also when it is not all. A cancellation (Ctrl-C under `asyncio.run`) ends it with
    `INTERRUPTED`.
    """
    seen = Seen()
    try:
        async with open_client(base_url) as http:
            api = LookupApi(http, base_url)
            seen.job_id = await api.submit(target, services, attempt_s)
            await _follow(api, seen.job_id, seen, timeout_s, None if as_json else out)
    except Stopped as stopped:
        _print_answer(out, seen, as_json=as_json)
        _say(err, stopped.message, _how_to_look_again(base_url, seen))
        return stopped.status
    except asyncio.CancelledError:
        _say(err, "Interrupted.", _how_to_look_again(base_url, seen) or "No job is known to have been accepted.")
        return Exit.INTERRUPTED
    _print_answer(out, seen, as_json=as_json)
    return Exit.COMPLETED if seen.job is not None and seen.job.status == "Completed" else Exit.FAILED


def open_client(base_url: str) -> httpx.AsyncClient:
    """A client of the service at `base_url` (http or https). Raises `Stopped` when that is no such address."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host or (url.port or 0) > PORT_MAX:
        raise Stopped(Exit.BAD_INPUT, f"Not the address of a service: {safe(base_url)}. Write it like http://127.0.0.1:8080")
    return httpx.AsyncClient(
        base_url=url,
        timeout=httpx.Timeout(EXCHANGE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        # A proxy from the environment is for other hosts: its loopback is not ours.
        mounts={f"all://{host}": None for host in LOOPBACK},
    )


async def _follow(api: "LookupApi", job_id: UUID, seen: Seen, timeout_s: float, shown_on: Console | None) -> None:
    showing = nullcontext(lambda _: None) if shown_on is None else progress(shown_on)
    try:
        async with asyncio.timeout(timeout_s):
            with showing as show:
                await api.follow(job_id, lambda job, document: _take(seen, job, document, show))
    except TimeoutError:
        raise Stopped(Exit.UNFINISHED, f"The job has not ended within {timeout_s:g} s. It goes on without us.") from None


def _take(seen: Seen, job: JobView, document: bytes, show: Callable[[JobView], None]) -> None:
    seen.job, seen.document = job, document
    show(job)


def _print_answer(out: Console, seen: Seen, *, as_json: bool) -> None:
    if seen.job is None:
        return
    if as_json:
        # Escaped down to ASCII: nothing in the document can steer the terminal, and nothing of it is lost.
        out.out(json.dumps(json.loads(seen.document), indent=2), highlight=False)
    else:
        out.print(job_report(seen.job))


def _say(err: Console, *lines: str) -> None:
    for line in filter(None, lines):
        err.print(Text(line), soft_wrap=True)


def _how_to_look_again(base_url: str, seen: Seen) -> str:
    if seen.job_id is None:
        return ""
    base = safe(base_url.rstrip("/"))
    return (
        f"The job is {seen.job_id}. Look again: {base}/#job={seen.job_id} in a browser, or curl {base}/api/lookup/{seen.job_id}"
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def message(self) -> str:
        """The service's own sentence about a refusal (RFC 9457 with `error`), or nothing."""
        document = _object_of(self.body)
        return safe(message) if isinstance(message := document.get("error"), str) else ""

    @property
    def retry_after_s(self) -> float:
        text = self.headers.get("Retry-After", "")
        return min(float(text), RETRY_AFTER_MAX_S) if text.isascii() and text.isdecimal() else 0.0


@dataclass
class _Lost(Exception):  # noqa: N818 - what became of an exchange
    """No answer came. `reached`: somebody had taken the request."""

    reached: bool


@dataclass(frozen=True, slots=True)
class LookupApi:
    """The service's HTTP contract. What a service refuses, or says in a way that none should, is raised as `Stopped`."""

    http: httpx.AsyncClient
    shown_url: str
    lost_polls_max: int = LOST_POLLS_MAX

    async def submit(self, target: str, services: Sequence[str], attempt_s: float | None = None) -> UUID:
        """The id of the accepted job. Never sent twice: a request whose answer is lost may have been accepted."""
        body: dict[str, Any] = {"target": _utf8(target), "services": [_utf8(service) for service in services] or None}
        if attempt_s is not None:
            body["timeoutSeconds"] = self._bound(attempt_s)
        try:
            answer = await self._exchange(self.http.build_request("POST", "/api/lookup", json=body))
        except _Lost as lost:
            raise self._broken_off() if lost.reached else self._unreachable() from None
        if answer.status != httpx.codes.ACCEPTED:
            raise self._refusal(answer)
        try:
            return UUID(_object_of(answer.body)["jobId"])
        except (KeyError, ValueError, TypeError, AttributeError):
            raise self._strange(answer.status) from None

    async def follow(self, job_id: UUID, news: Callable[[JobView, bytes], None]) -> None:
        """Calls `news` with the job and its document each time it has changed, until it is closed. The caller bounds the wait.

        Polls with If-None-Match: soon after each piece of news, then ever more slowly.
        """
        etag, wait_s, lost_polls = "", POLL_MIN_S, 0
        while True:
            answer = await self._poll(job_id, etag)
            lost_polls = lost_polls + 1 if answer is None else 0
            if lost_polls >= self.lost_polls_max:
                raise self._unreachable()
            if answer is not None and answer.status == httpx.codes.OK:
                job = self._job(answer)
                news(job, answer.body)
                if job.is_closed:
                    return
                etag, wait_s = answer.headers.get("ETag", ""), POLL_MIN_S
            await asyncio.sleep(max(wait_s, answer.retry_after_s if answer else 0.0))
            wait_s = min(wait_s * POLL_GROWTH, POLL_MAX_S)

    async def read(self, path: str, /, **query: object) -> bytes:
        """The JSON object that the service has at a path. `query` leaves out what is None."""
        known = {name: str(value) for name, value in query.items() if value is not None}
        try:
            answer = await self._exchange(self.http.build_request("GET", path, params=known))
        except _Lost:
            raise self._unreachable() from None
        if answer.status == httpx.codes.NOT_FOUND and answer.message:
            raise Stopped(Exit.FAILED, answer.message)
        if answer.status != httpx.codes.OK:
            raise self._refusal(answer)
        if not _object_of(answer.body):
            raise self._strange(answer.status)
        return answer.body

    def strange(self) -> Stopped:
        """For a body that no lookup service would send."""
        return self._strange(httpx.codes.OK)

    def _bound(self, attempt_s: float) -> float | None:
        """JSON has no word for some numbers of the command line, and the service would refuse them anyway."""
        try:
            return parse_timeout_s(attempt_s)
        except InvalidOption as invalid:
            raise Stopped(Exit.BAD_INPUT, invalid.message) from None

    async def _poll(self, job_id: UUID, etag: str) -> _Answer | None:
        """An answer that leads on (news, no news, busy); None when it was lost."""
        headers = {"If-None-Match": etag} if etag else {}
        try:
            answer = await self._exchange(self.http.build_request("GET", f"/api/lookup/{job_id}", headers=headers))
        except _Lost:
            return None
        if answer.status == httpx.codes.NOT_FOUND:
            raise Stopped(Exit.UNAVAILABLE, f"The service at {safe(self.shown_url)} does not know the job (any more).")
        if answer.status not in {httpx.codes.OK, httpx.codes.NOT_MODIFIED, *BUSY}:
            raise self._refusal(answer)
        return answer

    async def _exchange(self, request: httpx.Request) -> _Answer:
        try:
            async with asyncio.timeout(EXCHANGE_TIMEOUT_S):
                response = await self.http.send(request, stream=True)
                try:
                    return _Answer(response.status_code, response.headers, await self._body(response))
                finally:
                    await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise _Lost(reached=False) from None
        except (httpx.HTTPError, TimeoutError):
            raise _Lost(reached=True) from None

    async def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > BODY_BYTES_MAX:
                raise self._strange(response.status_code)
        return bytes(body)

    def _job(self, answer: _Answer) -> JobView:
        try:
            return JobView.model_validate_json(answer.body)
        except ValidationError:
            raise self._strange(answer.status) from None

    def _refusal(self, answer: _Answer) -> Stopped:
        if answer.status in REFUSED_INPUT and answer.message:
            return Stopped(Exit.BAD_INPUT, answer.message)
        if answer.status in BUSY:
            why = f"The service at {safe(self.shown_url)} is not ready ({answer.status}). {answer.message}".rstrip()
            return Stopped(Exit.UNAVAILABLE, f"{why}\nTry again shortly, or start a service of your own with `make run`.")
        return self._strange(answer.status)

    def _unreachable(self) -> Stopped:
        message = f"Nothing answers at {safe(self.shown_url)}."
        return Stopped(Exit.UNAVAILABLE, f"{message} Start the service with `make run`, or name another one with --url.")

    def _broken_off(self) -> Stopped:
        message = f"The service at {safe(self.shown_url)} broke off before it answered."
        return Stopped(Exit.UNAVAILABLE, f"{message} It is not known whether the job was accepted.")

    def _strange(self, status: int) -> Stopped:
        message = f"What answers at {safe(self.shown_url)} does not answer like a lookup service (status {status})."
        return Stopped(Exit.UNAVAILABLE, f"{message} Check --url, or start the service with `make run`.")


def _utf8(argument: str) -> str:
    """Bytes of a command line that are no UTF-8 arrive as lone surrogates, which JSON cannot carry: `?` for each."""
    return argument.encode(errors="replace").decode()


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}
