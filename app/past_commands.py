"""`lookup show`, `history` and `why`: their words. What they do is in `app/past.py`, imported only when one runs."""

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

DEFAULT_URL = "http://127.0.0.1:8080"
Json = Annotated[bool, Parameter(name="--json", negative=())]


def register(app: App) -> None:
    for command in (show, history, why):
        app.command(command)


def show(job: str, *, as_of: str | None = None, url: str = DEFAULT_URL, as_json: Json = False) -> int:
    """Print what is known of JOB, or what a poller could have seen in the past.

    Parameters
    ----------
    job
        The job's id.
    as_of
        A position of the log, or a time like 2026-01-02T03:04:05Z.
    url
        Where the service is.
    as_json
        Print the JSON document and nothing else.

    """
    from app import past

    return asyncio.run(past.printed(past.show(job, as_of), base_url=url, as_json=as_json))


def history(job: str, *, url: str = DEFAULT_URL, as_json: Json = False) -> int:
    """Tell everything that happened to JOB, a sentence for each fact.

    Parameters
    ----------
    job
        The job's id.
    url
        Where the service is.
    as_json
        Print the facts as JSON, with ids and hashes, and nothing else.

    """
    from app import past

    return asyncio.run(past.printed(past.history(job), base_url=url, as_json=as_json))


def why(job: str, path: str, *, as_of: str | None = None, url: str = DEFAULT_URL, as_json: Json = False) -> int:
    """Name the fact behind a field of JOB's document: who was asked, by whom, when, and what came back.

    Parameters
    ----------
    job
        The job's id.
    path
        A JSON pointer, with services by name: /results/RDAP/data/domain/registrar
    as_of
        A position of the log, or a time: why it said what it said then.
    url
        Where the service is.
    as_json
        Print JSON and nothing else.

    """
    from app import past

    return asyncio.run(past.printed(past.why(job, path, as_of), base_url=url, as_json=as_json))
