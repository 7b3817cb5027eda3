"""`lookup audit`: the words of its commands. What they do is in `app/audit/`, imported only when one runs."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

Flag = Parameter(negative=())
Json = Annotated[bool, Parameter(name="--json", negative=())]

audit = App(name="audit", help="Show and prove what happened: timelines, signed heads of the log, evidence.")


@audit.command
def keygen(*, file: Path | None = None, rotate: Annotated[bool, Flag] = False) -> int:
    """Make the key that heads of the log are signed with. Its public half goes into a file beside it, NAME.pub.

    Parameters
    ----------
    file
        Where (LOOKUP_HEADS_KEY_FILE).
    rotate
        Make one in the place of the key that is there. The old one endorses it and is gone; what it signed stays valid.

    """
    from app.audit.keys import KeyProblem, make_key, public_path
    from app.settings import Settings

    path = file or Settings().heads_key
    try:
        made = make_key(path, rotate=rotate)
    except KeyProblem as problem:
        print(f"lookup: {problem}", file=sys.stderr)
        return 1
    print(f"key id       {made.key_id}")
    print(f"public key   {made.public}")
    print(f"private key  {path}: for this machine only, and in no backup of the database")
    print(f"all public   {public_path(path)}: keep a copy elsewhere, with whoever is to verify")
    return 0


@audit.command
def verify(*, heads: Path | None = None, keys: Path | None = None, data_dir: Path | None = None, as_json: Json = False) -> int:
    """Verify the whole log: every fact, its chain, its result documents, and the signed heads. Stops nobody.

    Exit code 0 when all is what was recorded, 1 when something is not (the first bad position is named), 3 when unreadable.

    Parameters
    ----------
    heads
        A file of heads that was kept elsewhere; else the files that LOOKUP_HEADS_FILES names, and the table.
    keys
        A file of public keys that was kept elsewhere; else the one beside the private key.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app.audit import running

    return running.verify(data_dir, heads, keys, as_json=as_json)


@audit.command
def show(job: str, *, data_dir: Path | None = None, as_json: Json = False) -> int:
    """Show what happened to a job, fact by fact: what, when, by whom, why, and on whose request.

    Parameters
    ----------
    job
        Its id.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app.audit import running

    return running.show(data_dir, job, as_json=as_json)


@audit.command
def tree(job: str, *, data_dir: Path | None = None) -> int:
    """Show what led to what: the request, its facts, the commands that they gave, and what became of these.

    Parameters
    ----------
    job
        Its id.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.

    """
    from app.audit import running

    return running.tree(data_dir, job)


@audit.command
def export(job: str, *, out: Path | None = None, data_dir: Path | None = None) -> int:
    """Give all evidence about a job in one JSON file, which `app/audit/verify_evidence.py` alone checks anywhere, offline.

    Parameters
    ----------
    job
        Its id.
    out
        Where to write it; standard output if not given.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL otherwise.

    """
    from app.audit import running

    return running.export(data_dir, job, out)
