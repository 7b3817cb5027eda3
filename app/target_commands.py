"""`lookup target-history` and `lookup diff`: the words of the commands. What they do is in `app/target_client.py`."""

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

DEFAULT_URL = "http://127.0.0.1:8080"
Json = Annotated[bool, Parameter(name="--json", negative=())]

target_history = App(
    name="target-history", help="Show the jobs that asked about a target, and what changed from one to the next."
)
diff = App(name="diff", help="Show what changed between two jobs about a target, field by field.")


@target_history.default
def show_history(
    target: str, *, before: int | None = None, limit: int = 10, url: str = DEFAULT_URL, as_json: Json = False
) -> int:
    """Show the jobs that asked about TARGET, the newest first, and in which services the answer was another.

    Parameters
    ----------
    target
        An IP address or a domain.
    before
        Only jobs that were submitted before this position: the next page.
    limit
        So many jobs, 20 at most.
    url
        Where the service is.
    as_json
        Print the service's JSON document and nothing else.

    """
    from rich.console import Console

    from app import target_client

    out, err = Console(), Console(stderr=True)
    return int(asyncio.run(target_client.history(target, before, limit, base_url=url, as_json=as_json, out=out, err=err)))


@diff.default
def show_diff(
    target: str,
    *,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    to: str | None = None,
    url: str = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Show what changed between two jobs about TARGET. Exit code 1 if there are no two such jobs.

    Parameters
    ----------
    target
        An IP address or a domain.
    from_
        The earlier job: its id, or a position. The completed job before the other if not given.
    to
        The later job, likewise. The last completed one if not given.
    url
        Where the service is.
    as_json
        Print the service's JSON document and nothing else.

    """
    from rich.console import Console

    from app import target_client

    out, err = Console(), Console(stderr=True)
    return int(asyncio.run(target_client.diff(target, from_, to, base_url=url, as_json=as_json, out=out, err=err)))
