"""`lookup reparse` and `lookup what-if`: the words of the commands. What they do is imported only when one runs."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

TEXT_CHARS_MAX = 500
Flag = Parameter(negative=())
Json = Annotated[bool, Parameter(name="--json", negative=())]


def register(app: App) -> None:
    app.command(reparse)
    app.command(what_if, name="what-if")


def reparse(
    service: str,
    *,
    every: Annotated[bool, Parameter(name="--all", negative=())] = False,
    apply: Annotated[bool, Flag] = False,
    reason: str | None = None,
    actor: str | None = None,
    samples: int = 5,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Read the answers of a service again, from what was said and kept, and tell which come out differently. Asks nobody.

    Looks at answers that an older version of the parser read. Writes nothing without --apply; with it, what comes out
    differently is appended as a correction, and pollers see it. Exit code 1 if something is sealed or erased meanwhile.

    Parameters
    ----------
    service
        GeoIP, Ping, RDAP or ReverseDNS.
    every
        Also what this version of the parser has read already.
    apply
        Record the corrections.
    reason
        Why, for the record; must be given with --apply.
    actor
        Who, for the record; the user of this machine if not given.
    samples
        So many answers are shown.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app.reparse import Wish, service_named
    from app.reparse import reparse as run

    asked = service_named(service)
    if asked is None:
        return _wrong("A service is one of GeoIP, Ping, RDAP and ReverseDNS.")
    if apply != (reason is not None):
        return _wrong("--apply and --reason go together: what is recorded for ever says why.")
    if any(text is not None and not _is_told(text) for text in (reason, actor)) or samples < 0:
        return _wrong("A reason and an actor are printable text of 1 to 500 characters, and --samples is not negative.")
    return run(data_dir, Wish(asked, every=every, reason=reason, actor=actor, samples_max=samples), as_json=as_json)


def what_if(
    *,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    settings: Path | None = None,
    view: str | None = None,
    samples: int = 5,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Tell which jobs would have ended otherwise under other settings: the saga is decided again over the whole log.

    Never guesses: what an attempt that nobody made would have brought is unknown. With --view, tell which keys of a view
    would be different if it were another version of it. Writes nothing.

    Parameters
    ----------
    set_
        KEY=VALUE, may be repeated: attempts_max or timeout_s (or attempts_max.RDAP, of one service), interactive_lifetime_s,
        bulk_lifetime_s, redispatch_after_s.
    settings
        A file with KEY=VALUE on each line, changed before what --set changes.
    view
        MODULE:NAME of another version of a view, such as `projections.job_status:VIEW` in a changed checkout.
    samples
        So many jobs, or keys, are shown of each kind.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL (or LOOKUP_DATABASE_READ_URL) otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app.what_if import what_if as run
    from app.what_if import what_if_view

    if samples < 0:
        return _wrong("--samples is not negative.")
    if view is not None:
        if set_ or settings is not None:
            return _wrong("--view is a question of its own: it goes without --set and --settings.")
        return what_if_view(data_dir, view, samples_max=samples, as_json=as_json)
    return run(data_dir, set_, settings, samples_max=samples, as_json=as_json)


def _is_told(text: str) -> bool:
    return bool(text.strip()) and text.isprintable() and len(text) <= TEXT_CHARS_MAX


def _wrong(problem: str) -> int:
    print(f"lookup: {problem}", file=sys.stderr)
    return 2
