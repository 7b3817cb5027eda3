"""HTTP as bytes: requests that no client library would send, and what came back, taken apart strictly."""

import json
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

ANSWER_MAX_S = 5.0
"""No input to the API takes longer than this."""
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) [A-Za-z ']+")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Exchange:
    """All answers on one connection until the server closed it (or the client, after the first).

    `answered_s` is when the last byte of them came, counted from the connection's beginning.
    """

    answers: Sequence[Answer]
    answered_s: float


def talk(
    url: str, *pieces: bytes, pause_s: float = 0.0, give_up_s: float = 15.0, until_closed: bool = False, bodies: bool = True
) -> Exchange:
    """Send these pieces, with a pause before each but the first, and read what comes back.

    Ends with the first whole answer, or with the connection's end if `until_closed`. `bodies` is false where HEAD was asked.
    """
    began = answered_at = time.monotonic()
    parts = urlsplit(url)
    received = bytearray()
    with socket.create_connection((parts.hostname, parts.port), timeout=give_up_s) as conn:
        left = list(pieces)
        sends_at = began
        while time.monotonic() - began < give_up_s:
            if left and time.monotonic() >= sends_at:
                if not _sent(conn, left.pop(0)):
                    left.clear()
                sends_at = time.monotonic() + pause_s
            conn.settimeout(max(0.001, sends_at - time.monotonic()) if left else give_up_s)
            try:
                chunk = conn.recv(65_536)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not chunk:
                break
            received += chunk
            answered_at = time.monotonic()
            if not until_closed and not left and _holds_an_answer(bytes(received), bodies=bodies):
                break
    return Exchange(answers_in(bytes(received), bodies=bodies), answered_at - began)


def _sent(conn: socket.socket, piece: bytes) -> bool:
    """Whether the server still takes what is sent: after an early refusal it need not."""
    try:
        conn.sendall(piece)
    except (ConnectionError, TimeoutError):
        return False
    return True


def _holds_an_answer(received: bytes, *, bodies: bool) -> bool:
    try:
        return bool(answers_in(received, bodies=bodies))
    except AssertionError:
        return False


def answers_in(received: bytes, *, bodies: bool) -> list[Answer]:
    """The final answers in a stream (100 Continue is none). Fails on anything that is not HTTP."""
    answers: list[Answer] = []
    while received:
        head, found, rest = received.partition(b"\r\n\r\n")
        assert found, f"no end of the head in {received[:200]!r}"
        status_line, *lines = head.split(b"\r\n")
        status = _STATUS_LINE.fullmatch(status_line)
        assert status is not None, f"no status line: {status_line!r}"
        headers = {name.decode("ascii").lower(): value.strip().decode("latin-1") for name, _, value in _fields(lines)}
        # What is refused before it is understood is answered with a body, even where HEAD was asked.
        length = int(headers.get("content-length", "0")) if bodies or rest.startswith(b"{") else 0
        assert len(rest) >= length, "the body is not whole"
        if status[1] != b"100":
            answers.append(Answer(int(status[1]), headers, rest[:length]))
        received = rest[length:]
    return answers


def _fields(lines: Sequence[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    return [line.partition(b":") for line in lines]
