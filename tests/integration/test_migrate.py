"""`migrate` takes its time: it runs once, at a deployment, and nobody waits behind it as behind an append."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from app.migrate import migrate

SLOW_S = 2.5
"""Longer than a part that serves waits for a connection, or gives one try at it."""


def test_a_database_that_is_slow_to_answer_is_waited_for(database_url: str, tmp_path: Path) -> None:
    with slow_to_answer(database_url, tmp_path) as slow_url:
        migrate(slow_url, uuid4(), {})

    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT count(*) FROM log_identity").fetchone() == (1,)


@contextmanager
def slow_to_answer(database_url: str, folder: Path) -> Iterator[str]:
    """The same database by a socket in this folder, behind which each connection is held up for `SLOW_S` first."""
    told = conninfo_to_dict(database_url)
    there = f"{told['host']}/.s.PGSQL.{told['port']}"
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(folder / ".s.PGSQL.5432"))
        listener.listen()
        threading.Thread(target=_accept, args=[listener, there], daemon=True).start()
        yield make_conninfo(database_url, host=str(folder), port=5432)
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, there: str) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=[client, there], daemon=True).start()


def _serve(client: socket.socket, there: str) -> None:
    time.sleep(SLOW_S)
    server = socket.socket(socket.AF_UNIX)
    server.connect(there)
    threading.Thread(target=_pass_on, args=[client, server], daemon=True).start()
    _pass_on(server, client)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
