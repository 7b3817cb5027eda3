"""A fresh database per test on one PostgreSQL server."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
from psycopg import sql


@contextmanager
def fresh_database(owner_url: str) -> Iterator[str]:
    """The URL of an empty database beside that of `owner_url`, of the same owner; gone afterwards, whoever is connected."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield urlsplit(owner_url)._replace(path=f"/{name}").geturl()
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
