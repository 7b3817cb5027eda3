"""`lookup dead-letters`: the words of its commands. What they do is in `app/dead_letters.py`, imported only when one runs."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

TEXT_CHARS_MAX = 500
Flag = Parameter(negative=())
Json = Annotated[bool, Parameter(name="--json", negative=())]

letters = App(name="dead-letters", help="Messages that could not be handled: look at them, retry or discard them.")


@letters.command(name="list")
def list_letters(
    *, state: str = "waiting", limit: int = 20, after: int = 0, data_dir: Path | None = None, as_json: Json = False
) -> int:
    """Show how many there are, by state, reason and queue, and the oldest of them.

    Parameters
    ----------
    state
        waiting, retried or discarded.
    limit
        So many letters are shown; the counts are of all.
    after
        Go on behind the letter with this id.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app import dead_letters

    if state not in dead_letters.STATES or limit < 0:
        return _wrong(f"A state is one of {', '.join(dead_letters.STATES)}, and a limit is not negative.")
    return dead_letters.list_letters(data_dir, state, limit=limit, after=after, as_json=as_json)


@letters.command
def show(letter_id: int, *, data_dir: Path | None = None, as_json: Json = False) -> int:
    """Show one letter, whole; exit code 1 if there is none with this id.

    Parameters
    ----------
    letter_id
        As `list` shows it.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.
    as_json
        Print JSON and nothing else; the body's bytes are in `body_base64`.

    """
    from app import dead_letters

    return dead_letters.show_letter(data_dir, letter_id, as_json=as_json)


@letters.command
def retry(
    *letter_id: int,
    every: Annotated[bool, Parameter(name="--all", negative=())] = False,
    dry_run: Annotated[bool, Flag] = False,
    rate: float | None = None,
    reason: str | None = None,
    actor: str | None = None,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Publish letters to their queues again. Exit code 1 if one that was named was left alone.

    A letter whose job has ended is left alone: nobody waits for it any more. Those of one job keep their order.

    Parameters
    ----------
    letter_id
        Which; may be several.
    every
        All that wait.
    dry_run
        Change nothing, only say what would be done.
    rate
        At most so many a second.
    reason
        Why, for the record.
    actor
        Who, for the record; the user of this machine if not given.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL and the other variables otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app import dead_letters

    if (problem := _of_choice(letter_id, every=every) or of_text(reason, actor)) is not None:
        return _wrong(problem)
    if rate is not None and rate <= 0:
        return _wrong("A rate is a number above 0.")
    choice = dead_letters.Choice(None if every else letter_id, dry_run=dry_run, rate=rate)
    return dead_letters.retry_letters(data_dir, choice, reason=reason, actor=actor, as_json=as_json)


@letters.command
def discard(
    *letter_id: int,
    reason: str,
    every: Annotated[bool, Parameter(name="--all", negative=())] = False,
    dry_run: Annotated[bool, Flag] = False,
    actor: str | None = None,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Decide that letters will never be handled; they stay in the table. Exit code 1 if one that was named was left alone.

    Parameters
    ----------
    letter_id
        Which; may be several.
    reason
        Why, for the record.
    every
        All that wait.
    dry_run
        Change nothing, only say what would be done.
    actor
        Who, for the record; the user of this machine if not given.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app import dead_letters

    if (problem := _of_choice(letter_id, every=every) or of_text(reason, actor)) is not None:
        return _wrong(problem)
    choice = dead_letters.Choice(None if every else letter_id, dry_run=dry_run)
    return dead_letters.discard_letters(data_dir, choice, reason=reason, actor=actor, as_json=as_json)


def _of_choice(letter_ids: tuple[int, ...], *, every: bool) -> str | None:
    if every == bool(letter_ids):
        return "Say which letters: ids as `lookup dead-letters list` shows them, or --all."
    return None


def of_text(*texts: str | None) -> str | None:
    """What is recorded for ever should say something, and not break the record."""
    if any(text is not None and (not text.strip() or not text.isprintable() or len(text) > TEXT_CHARS_MAX) for text in texts):
        return "A reason and an actor are printable text of 1 to 500 characters."
    return None


def _wrong(problem: str) -> int:
    print(f"lookup: {problem}", file=sys.stderr)
    return 2
