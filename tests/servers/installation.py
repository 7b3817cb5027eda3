"""How tests come by a program that no wheel brings: from the PATH, else by apt where we may, else the run ends and says how."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

POLICY = Path("/usr/sbin/policy-rc.d")


def find_program(names: Sequence[str], also_in: Sequence[str] = ()) -> Path | None:
    """The first of `names` in the folders `also_in`, then on the PATH."""
    for name in names:
        for folder in (*also_in, None):
            if found := shutil.which(name, path=folder):
                return Path(found)
    return None


def need_program(names: Sequence[str], package: str, also_in: Sequence[str] = (), otherwise: str = "") -> Path:
    """As `find_program`; installs Debian's `package` if need be. Ends the whole run with what to type if it cannot."""
    if found := find_program(names, also_in):
        return found
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with _one_at_a_time():
            if (found := find_program(names, also_in)) or (_installed(package) and (found := find_program(names, also_in))):
                return found
    pytest.exit(f"The tests need {names[0]}. Type: sudo apt-get install {package}{otherwise}", returncode=1)


def _installed(package: str) -> bool:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_service_started():
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
            done = subprocess.run(["apt-get", *words], env=environment, stdin=subprocess.DEVNULL, check=False, timeout=600)
            if done.returncode != 0:
                return False
    return True


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """The tests run in several processes, and each of them may miss the program at the same time."""
    with (Path(tempfile.gettempdir()) / "lookup-tests-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _no_service_started() -> Iterator[None]:
    """Keep the package from starting a server of its own; where a policy exists, it is the machine's and stands."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
