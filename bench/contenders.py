"""Who is measured, and one measurement of one of them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.children import Child, start
from bench.load import Load, Measured
from bench.product import LAYOUTS
from bench.servers import Corner

CLIENT_S = 900.0


@dataclass(frozen=True, slots=True)
class Contender:
    """`processes` are the options of each process that does the work, by its name."""

    name: str
    module: str
    processes: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @property
    def is_ours(self) -> bool:
        return self.module == "bench.product"

    def measure(self, corner: Corner, load: Load, run_folder: Path, *, sampled: bool = False) -> Measured:
        """Start the processes and a client in `run_folder`, and end them whatever happens. Raises `BenchFailed`."""
        run_folder.mkdir(parents=True)
        with ExitStack() as stack:
            started = {
                name: self._start(name, options, corner, run_folder, stack, sampled) for name, options in self.processes.items()
            }
            told = {name: child.wait_until_told() for name, child in started.items()}
            options = {"corner": asdict(corner), "load": asdict(load), "urls": self._urls(told)}
            client = start(self.module, "load", "client", options, run_folder)
            stack.callback(client.stop)
            return Measured(**client.wait_until_told(CLIENT_S))

    def _start(
        self, name: str, options: Mapping[str, Any], corner: Corner, run_folder: Path, stack: ExitStack, sampled: bool
    ) -> Child:
        whole = {**options, "name": name.replace(" ", "-"), "corner": asdict(corner)}
        if sampled:
            whole["samples"] = str(run_folder / f"{whole['name']}.samples")
        child = start(self.module, "serve", name, whole, run_folder)
        stack.callback(child.stop)
        return child

    def _urls(self, told: Mapping[str, str]) -> dict[str, str]:
        """Where our write and read sides listen."""
        if not self.is_ours:
            return {}
        return {
            part: told[name]
            for name, options in self.processes.items()
            for part in ("write", "read")
            if part in options["parts"]
        }


def _ours(layout: str, processes: Sequence[Sequence[str]]) -> Contender:
    names = {f"lookup {number}": {"parts": parts} for number, parts in enumerate(processes, start=1)}
    return Contender(f"lookup, {layout}", "bench.product", names)


OURS = [_ours(layout, processes) for layout, processes in LAYOUTS.items()]
CELERY = Contender("celery chord", "bench.celery_chord", {f"celery {n}": {"pool": "solo", "concurrency": 1} for n in (1, 2)})
DRAMATIQ = Contender("dramatiq group", "bench.dramatiq_group", {f"dramatiq {n}": {"threads": 8} for n in (1, 2)})
CONTENDERS = [*OURS, CELERY, DRAMATIQ]
