"""`lookup backup` and `lookup restore`: their words. What they do is in `app/backup/`, imported only when one runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from app.settings import Settings

Flag = Annotated[bool, Parameter(negative=())]
Json = Annotated[bool, Parameter(name="--json", negative=())]


def register(app: App) -> None:
    app.command(backup)
    app.command(restore)


def backup(folder: Path, *, data_dir: Path | None = None, as_json: Json = False) -> int:
    """Copy everything that is worth keeping into FOLDER, at one moment, while the service runs. Nobody waits for it.

    Parameters
    ----------
    folder
        A new or empty folder.
    data_dir
        The folder of `lookup up` (.data), running or not; LOOKUP_DATABASE_OWNER_URL otherwise.
    as_json
        Print JSON and nothing else.

    """
    from app.backup.running import back_up

    return back_up(_settings(data_dir), folder, as_json=as_json)


def restore(
    folder: Path,
    *,
    into: str | None = None,
    verify: Flag = False,
    database_only: Flag = False,
    actor: str | None = None,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Put the backup in FOLDER into an empty database, where it goes on as another log. All of it, or nothing.

    Views and messages of the log that was lost are taken out of Redis and the broker. Stop every part first.

    Parameters
    ----------
    folder
        A folder that `lookup backup` made.
    into
        The owner's URL of the database; LOOKUP_DATABASE_OWNER_URL if not given.
    verify
        Survey what came out: every chain, the head of the log, every result, and the views that the facts are folded into.
    database_only
        Leave Redis and the broker alone: they are new, and know nothing of the lost log.
    actor
        Who, for the record; the user of this machine if not given.
    data_dir
        Where no database is named: the folder of `lookup up` (.data), which must not run and must not have facts.
    as_json
        Print JSON and nothing else.

    """
    from app.backup import running

    return running.restore(
        _settings(data_dir), folder, into=into, verify=verify, database_only=database_only, actor=actor, as_json=as_json
    )


def _settings(data_dir: Path | None) -> "Settings":
    from app.logs import set_up_logs
    from app.settings import Settings

    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)
    return settings
