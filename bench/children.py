"""The processes of a run: each in a folder of its own, waited for within a bound, ended by its id, and never outliving us.

A child is started as `python -m MODULE VERB NAME JSON`. What it has to tell, it leaves in its folder: `told.json`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.embedded.child import Account, end, launch

ROOT = Path(__file__).parents[1]
TOLD = Path("told.json")
READY_S = 60.0
STOP = ((signal.SIGTERM, 25.0),)


class BenchFailed(Exception):  # noqa: N818 - an outcome, in our words
    """A run cannot go on; the text says what to look at."""


@dataclass
class Child:
    """A process of ours. `folder` holds its output and what it told."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]

    def wait_until_told(self, wait_s: float = READY_S) -> Any:
        """What the child left in `told.json`: that it is ready, or what it found. Raises `BenchFailed`."""
        give_up_at = time.monotonic() + wait_s
        while not (self.folder / TOLD).exists():
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                how = "took too long" if self.process.poll() is None else "ended"
                raise BenchFailed(f"{self.name} {how}. It said last:\n{self._last_words()}")
            time.sleep(0.02)
        return json.loads((self.folder / TOLD).read_bytes())

    def stop(self) -> None:
        if self.process.poll() is None:
            end(self.process, STOP)
        with suppress(ProcessLookupError):  # What it started belongs to its group.
            os.killpg(self.process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        return (self.folder / "output").read_text(errors="replace")[-3000:]


def start(module: str, verb: str, name: str, options: Mapping[str, Any], run_folder: Path) -> Child:
    folder = run_folder / name.replace(" ", "-")
    folder.mkdir()
    process = launch(
        [sys.executable, "-m", module, verb, name, json.dumps(options)],
        folder=folder,
        account=Account(),
        log=folder / "output",
        if_we_die=signal.SIGKILL,
        # Nothing of the caller's LOOKUP_… settings reaches a measurement.
        environment={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
    )
    return Child(name, folder, process)


def tell(what: Any) -> None:
    """In a child: leave something for the bench, whole or not at all."""
    draft = TOLD.with_suffix(".new")
    draft.write_text(json.dumps(what))
    draft.replace(TOLD)
