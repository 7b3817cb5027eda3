"""`lookup retention` and `lookup erase`: the words of the commands. What they do is imported only when one runs."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from app.letter_commands import of_text

Flag = Parameter(negative=())
Json = Annotated[bool, Parameter(name="--json", negative=())]

retention = App(name="retention", help="Jobs that ended long ago: seal them into segment files.")


@retention.command(name="run")
def run_retention(
    *,
    dry_run: Annotated[bool, Flag] = False,
    days: float | None = None,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Seal now what `lookup keeper` would seal by and by. Exit code 2 if retention is off, 3 if something is out of reach.

    Parameters
    ----------
    dry_run
        Change nothing, only say what would be sealed.
    days
        Seal what ended longer ago than this; LOOKUP_LOG_RETENTION_DAYS if not given.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL and LOOKUP_DATABASE_RETENTION_URL otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app.retention import run_retention as run

    if days is not None and days <= 0:
        print("lookup: --days is a number above 0.", file=sys.stderr)
        return 2
    return run(data_dir, days=days, dry_run=dry_run, as_json=as_json)


def erase(
    *,
    target: str | None = None,
    reason: str | None = None,
    actor: str | None = None,
    resume: Annotated[bool, Flag] = False,
    apply_list: Annotated[bool, Flag] = False,
    dry_run: Annotated[bool, Flag] = False,
    compact: Annotated[bool, Flag] = False,
    receipt: Path | None = None,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Take everything that tells of a target out of facts, results, views, dead letters, queues and segments; print a receipt.

    Exit code 1 when something has to happen first (it says what), 3 when a server is out of reach: then `--resume`.

    Parameters
    ----------
    target
        The IP address or domain, in any spelling.
    reason
        Why, for the record. It stays in the log for ever: do not name the target or a person in it.
    actor
        Who, for the record; the user of this machine if not given.
    resume
        Go on with what was begun and not finished.
    apply_list
        Erase again what the erasure list names: after a restore of an older backup.
    dry_run
        Change nothing, only say how much tells of the target.
    compact
        Afterwards write the servers' files anew, without what was deleted. Locks each table meanwhile.
    receipt
        Write the receipt's JSON to this file, too.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL and the other variables otherwise.
    as_json
        Print the receipts as JSON and nothing else.

    """
    if (
        problem := _wrong_order(target, reason, resume=resume, apply_list=apply_list, dry_run=dry_run, compact=compact)
    ) is None:
        problem = of_text(reason, actor)
    if problem is not None:
        print(f"lookup: {problem}", file=sys.stderr)
        return 2
    from app.erasure import Order
    from app.erasure import erase as carry_out

    order = Order(target, reason or "", actor, dry_run, apply_list, compact, receipt, as_json)
    return carry_out(data_dir, order)


def _wrong_order(
    target: str | None, reason: str | None, *, resume: bool, apply_list: bool, dry_run: bool, compact: bool
) -> str | None:
    if (target is not None) + resume + apply_list > 1 or not (target is not None or resume or apply_list or compact):
        return "Give one of --target, --resume and --apply-list; or --compact alone."
    if target is None and (dry_run or reason is not None):
        return "--dry-run and --reason are for --target."
    if target is not None and reason is None and not dry_run:
        return "An erasure needs a --reason."
    return None
