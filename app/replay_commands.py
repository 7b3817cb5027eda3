"""`lookup replay`: its words. What it does is in `app/replaying.py`, imported only when it runs."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from app import reparse_commands

Flag = Annotated[bool, Parameter(negative=())]
Json = Annotated[bool, Parameter(name="--json", negative=())]


def register(app: App) -> None:
    app.command(replay)


def replay(
    *,
    view: Annotated[list[str] | None, Parameter(negative=())] = None,
    dry_run: Flag = False,
    rate: float | None = None,
    keep: float = 10.0,
    rollback: Flag = False,
    reparse: str | None = None,
    apply: Flag = False,
    reason: str | None = None,
    what_if: Flag = False,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Build the views anew from the log beside those that are shown, tell what will change, and show the new ones.

    Who polls sees neither an error nor anything older meanwhile. One that is interrupted is gone on with when it is run again.

    Parameters
    ----------
    view
        Only this view; may be repeated. All if not given.
    dry_run
        Only tell what would change.
    rate
        At most so many events a second. Give more than come in, or it never catches up with what is shown.
    keep
        So many minutes the views that were shown before are kept up to date, for --rollback.
    rollback
        Show again what was shown before the last replay.
    reparse
        Instead, read the answers of this service again, as `lookup reparse` does.
    apply
        Record what --reparse finds, with a --reason.
    reason
        Why, for the record of --reparse.
    what_if
        Instead, tell what would have been otherwise, as `lookup what-if` does: with --set, or --view MODULE:NAME.
    set_
        KEY=VALUE, for --what-if; may be repeated.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_READ_URL or LOOKUP_DATABASE_URL, and LOOKUP_REDIS_URL
        otherwise.
    as_json
        Print JSON and nothing else.

    """
    if reparse is not None and what_if:
        return _wrong("--reparse and --what-if are two questions.")
    if reparse is None and (apply or reason is not None):
        return _wrong("--apply and --reason are for --reparse.")
    if set_ and not what_if:
        return _wrong("--set is for --what-if.")
    if reparse is not None or what_if:
        if rollback or rate is not None or (apply and dry_run) or len(view or ()) > what_if:
            return _wrong("That goes with another question; see --help.")
        if reparse is not None:
            return reparse_commands.reparse(reparse, apply=apply, reason=reason, data_dir=data_dir, as_json=as_json)
        other = view[0] if view else None
        return reparse_commands.what_if(set_=set_, view=other, data_dir=data_dir, as_json=as_json)
    from app import replaying

    wish = replaying.Wish(tuple(view or ()), dry_run=dry_run, rate=rate, keep_minutes=keep)
    if (problem := replaying.problem_of(wish, rollback=rollback)) is not None:
        return _wrong(problem)
    run = replaying.roll_back if rollback else replaying.replay
    return run(data_dir, wish, as_json=as_json)


def _wrong(problem: str) -> int:
    print(f"lookup: {problem}", file=sys.stderr)
    return 2
