"""Small files beside the servers' folders: the lock, notes and logs. They belong to whoever owns the data folder."""

import os
from pathlib import Path


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, and for the data folder's owner only."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        give_to_owner_of(path.parent, file.fileno())
        file.write(text)
    draft.replace(path)


def new_log(path: Path) -> Path:
    """One log per start; the one before is kept beside it."""
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))
    write_private(path, "")
    return path


def give_to_owner_of(folder: Path, descriptor: int) -> None:
    """One run with sudo must not shut the folder's owner out of the next."""
    if os.geteuid() == 0:
        os.fchown(descriptor, folder.stat().st_uid, folder.stat().st_gid)
