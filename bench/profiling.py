"""Where our time goes: one run of ours under load, sampled, and the top of what was seen, in milliseconds per job."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.load import Measured

TOP = 25
SECTIONS = {
    "threads": "by thread",
    "areas": "by module that the work was begun by (libraries: before any of ours)",
    "with_calls": "our functions, with all that they call",
    "alone": "functions alone (code in C counts for its caller)",
}


def print_profile(run_folder: Path, measured: Measured, console: Console) -> None:
    """Samples cover the single jobs and the warm-up too; figures are scaled to the processor time of the many jobs."""
    for file in sorted(run_folder.glob("*.samples")):
        samples: dict[str, dict[str, float]] = json.loads(file.read_bytes())
        name = file.stem.replace("-", " ")
        total = sum(samples["threads"].values())
        per_job = 1000 * measured.processor_s.get(name, 0.0) / measured.jobs
        console.print(f"\n[bold]{name}[/bold]: {per_job:.2f} ms of processor time per job")
        for section, title in SECTIONS.items():
            console.print(_table(title, samples[section], total, per_job))


def _table(title: str, seconds: Mapping[str, float], total: float, per_job: float) -> Table:
    table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left")
    table.add_column("ms/job", justify="right")
    table.add_column("%", justify="right")
    table.add_column("where")
    for where, used in sorted(seconds.items(), key=lambda item: -item[1])[:TOP]:
        table.add_row(f"{per_job * used / total:.3f}", f"{100 * used / total:.1f}", where)
    return table
