"""What `lookup backup` and `lookup restore` do: find the servers, do the work, and say what came of it."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from app.audit.keys import public_path
from app.backup.failure import BackupFailed, RestoreRefused
from app.backup.manifest import Manifest
from app.backup.restoring import Restore, Restored
from app.backup.surroundings import forget_views_and_messages
from app.backup.taking import Beside, take_backup
from app.embedded.servers import Embedded, find_running
from app.erasure import hold_against_list
from app.running import CannotRun, passwords_of, settings_of_running, user_name, with_embedded
from app.settings import Settings
from app.wiring import new_id, utc_now

UNREACHABLE = 3


def back_up(settings: Settings, folder: Path, *, as_json: bool) -> int:
    """Back up the database that the settings name, else that of the data folder, whether it runs or not."""
    with _servers(settings, new=False) as found:
        url = found.database_owner_url or found.database_read_url or found.database_url
        if url is None:
            return _say_no("There is no database: nothing runs here, and LOOKUP_DATABASE_OWNER_URL is not set.", UNREACHABLE)
        try:
            manifest = asyncio.run(take_backup(folder, url, found.segments, beside(found), utc_now()))
        except BackupFailed as failed:
            return _say_no(str(failed), 1)
    _tell(as_json, _as_json(manifest), lambda: _print_backup(folder, manifest))
    return 0


def restore(
    settings: Settings,
    folder: Path,
    *,
    into: str | None,
    verify: bool,
    database_only: bool,
    actor: str | None,
    as_json: bool,
) -> int:
    """Restore into the database `into`, else into that of the settings, else into a new one in the data folder."""
    if into is not None:
        settings = settings.model_copy(update={"database_owner_url": into})
    if settings.database_owner_url is None and find_running(settings.data_dir) is not None:
        return _say_no(f"A lookup runs on {settings.data_dir}. Stop it first.", 1)
    with _servers(settings, new=True) as found:
        if found.database_owner_url is None:
            return _say_no("LOOKUP_DATABASE_OWNER_URL is not set, and --into names no database.", 2)
        if found.redis_url is None and not database_only:
            return _say_no(
                "LOOKUP_REDIS_URL is not set. Redis and the broker may hold what the lost log told: give their URLs, or"
                " --database-only if they are new.",
                2,
            )
        work = Restore(
            folder=folder,
            owner_url=found.database_owner_url,
            segments=found.segments,
            beside=beside(found),
            passwords=passwords_of(found),
            actor=actor or user_name(),
            now=utc_now,
            new_id=new_id,
            forget=_nothing if database_only else partial(forget_views_and_messages, found.redis_url or "", found.broker_url),
            verify=verify,
        )
        try:
            restored = asyncio.run(work.run())
            _tell(as_json, _restored_as_json(restored), partial(_print_restored, restored))
            # Nothing serves a log that tells what was erased from a newer one: this makes it fit to be served.
            hold_against_list(_as_owner(found), mend=not database_only)
        except (RestoreRefused, CannotRun) as refused:
            return _say_no(str(refused), 1)
    return 0


def beside(settings: Settings) -> list[Beside]:
    """The heads of the log, as they were written outside of the database, with the public keys that they are checked with,
    and the list of what was erased. Not the private key: who has a backup should not be able to sign.
    """
    heads = [Beside(path, f"heads/{number}.jsonl") for number, path in enumerate(settings.heads_outside, start=1)]
    keys = Beside(public_path(settings.heads_key), "heads/keys")
    return [*heads, keys, Beside(settings.erasures, "erasures.jsonl")]


def _as_owner(settings: Settings) -> Settings:
    """The owner may all that the roles of the parts may, and has no need of their passwords."""
    url = settings.database_owner_url
    return settings.model_copy(update={"database_url": url, "database_read_url": url, "database_retention_url": url})


async def _nothing() -> None:
    """Redis and the broker are new, or somebody else's care."""


@contextmanager
def _servers(settings: Settings, *, new: bool) -> Iterator[Settings]:
    """The settings, completed by the servers of the data folder: those that run, else those that are started for this.

    Not where the settings name a database themselves; and only for a restore in a folder that has none yet.
    """
    settings = settings_of_running(settings)
    if settings.database_owner_url or settings.database_url or not (new or (settings.data_dir / "postgres").is_dir()):
        yield settings
        return
    embedded = Embedded(settings.data_dir, valkey=settings.redis_url is None)
    try:
        servers = embedded.start()
        yield with_embedded(settings, servers.database_owner_url, servers.redis_url)
    finally:
        embedded.stop()


def _as_json(manifest: Manifest) -> dict[str, Any]:
    told: dict[str, Any] = manifest.model_dump(mode="json", include={"log_id", "taken_at", "survey"})
    return told | {"size_bytes": _size(manifest), "files": len(manifest.files)}


def _restored_as_json(restored: Restored) -> dict[str, Any]:
    own = {"restored_as": str(restored.log_id), "verified": restored.surveyed is not None}
    return _as_json(restored.manifest) | own


def _size(manifest: Manifest) -> int:
    return sum(entry.size_bytes for entry in manifest.files)


def _print_backup(folder: Path, manifest: Manifest) -> None:
    survey = manifest.survey
    print(f"Backed up log {manifest.log_id} to {folder}: {_size(manifest) / 1e6:,.1f} MB in {len(manifest.files)} files.")
    print(f"{survey.facts:,} facts of {survey.jobs:,} jobs, up to position {survey.position}; {survey.results:,} results.")
    if survey.missing_results:
        print(f"{survey.missing_results:,} results are missing or damaged, there as well as here.")
    if survey.broken_streams:
        print(f"The chain of {survey.broken_streams:,} streams does not verify: they are backed up as they are.")
    print(f"Head {survey.log_head}")


def _print_restored(restored: Restored) -> None:
    survey = restored.manifest.survey
    print(f"Restored {survey.facts:,} facts of {survey.jobs:,} jobs as log {restored.log_id}.")
    print(f"Until position {survey.position} it was log {restored.manifest.log_id}.")
    print(f"It was backed up {restored.manifest.taken_at:%F %T} UTC; what happened there afterwards is lost.")
    if restored.surveyed is None:
        print("Every file is what was written. --verify would have surveyed what came out as well.")
    else:
        print("Verified: every chain, the head of the log, every result, and the views that its facts are folded into.")


def _tell(as_json: bool, told: dict[str, Any], say: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        say()


def _say_no(why: str, code: int) -> int:
    print(f"lookup: {why}", file=sys.stderr)
    return code
