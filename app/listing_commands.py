"""`lookup jobs` and `lookup stats`: their words. What they do is in `app/listings.py`, imported only when one runs."""

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

DEFAULT_URL = "http://127.0.0.1:8080"
Json = Annotated[bool, Parameter(name="--json", negative=())]


def register(app: App) -> None:
    for command in (jobs, stats):
        app.command(command)


def jobs(
    *,
    target: str | None = None,
    status: str | None = None,
    after: int | None = None,
    limit: int = 20,
    url: str = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """List jobs, the newest first.

    Parameters
    ----------
    target
        Only those about this IP address or domain.
    status
        Only those that are Pending, Processing, Completed, Failed or Cancelled.
    after
        Go on where a page before ended.
    limit
        So many jobs, 200 at most.
    url
        Where the service is.
    as_json
        Print the service's JSON document and nothing else.

    """
    from app import listings, past

    asked = listings.jobs(target=target, status=status, after=after, limit=limit)
    return asyncio.run(past.printed(asked, base_url=url, as_json=as_json))


def stats(*, hours: int | None = None, url: str = DEFAULT_URL, as_json: Json = False) -> int:
    """Show how each service fares: how its tasks ended, and how long answers took.

    Parameters
    ----------
    hours
        Only of the last hours, this one included; 168 at most. Everything that the log tells of if not given.
    url
        Where the service is.
    as_json
        Print the service's JSON document, with error codes, and nothing else.

    """
    from app import listings, past

    return asyncio.run(past.printed(listings.stats(hours), base_url=url, as_json=as_json))
