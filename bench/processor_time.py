"""Who uses the processors: seconds of processor time by program, for everything that a bench has started."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Process:
    """`ticks` include those of children that have ended."""

    pid: int
    parent: int
    comm: str
    ticks: int


def processor_seconds(root: int) -> dict[str, float]:
    """Seconds by program of all that descend from the process `root`, itself left out.

    A process of `bench.children` counts under the name that it was given, with its children; a server under its program's.
    """
    processes = {process.pid: process for process in _processes()}
    seconds: dict[str, float] = {}
    for process in processes.values():
        top = _child_of(root, process, processes)
        if top is not None:
            name = _name_of(top)
            seconds[name] = seconds.get(name, 0.0) + process.ticks / _TICKS_PER_S
    return seconds


def spent(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was used between two readings, without programs that hardly used anything."""
    used = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
    return {name: round(seconds, 2) for name, seconds in used.items() if seconds >= 2 / _TICKS_PER_S}


def _processes() -> Iterator[_Process]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # It ended while we looked.
        # A program's name may hold blanks and brackets: the last bracket ends it (proc(5)).
        head, _, tail = stat.rpartition(")")
        fields = tail.split()
        yield _Process(int(folder.name), int(fields[1]), head.partition("(")[2], sum(int(field) for field in fields[11:15]))


def _child_of(root: int, process: _Process, processes: dict[int, _Process]) -> _Process | None:
    """The child of `root` that `process` is or descends from."""
    while process.parent != root:
        parent = processes.get(process.parent)
        if parent is None:
            return None
        process = parent
    return process


def _name_of(process: _Process) -> str:
    try:
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return process.comm
    # `python -m bench.something verb NAME …`, as bench/children.py starts it.
    return words[4].decode() if words[1:2] == [b"-m"] and words[2].startswith(b"bench.") else process.comm
