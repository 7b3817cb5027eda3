"""`python -m bench.replay`: how many facts a second a replay folds, beside the `eventsourcing` library's ProjectionRunner."""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psycopg
import redis
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from app.embedded.failure import EmbeddedError
from bench.children import BenchFailed, start
from bench.replay_contenders import DONE_WITHIN_S, Replayed
from bench.replay_log import FACTS_OF_A_JOB, fill
from bench.report import machine, print_machine
from bench.servers import Corner, Transport, running_servers
from projections.views import JOB_STATUS, Keys

MODULE = "bench.replay_contenders"
OURS, ALL_VIEWS = "lookup replay, job documents", "lookup replay, all views"
LIBRARY, LIBRARY_LAX = "ProjectionRunner, as documented", "ProjectionRunner, synchronous_commit off"

app = App(name="bench.replay", help="Measures how fast views are made of a log.")


@app.default
def compare(
    *,
    events: int = 1_000_000,
    library_events: int = 50_000,
    seed: int = 1,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> int:
    """Make a log, and make job documents of it in both ways.

    Parameters
    ----------
    events
        Facts in the log; ten of each job.
    library_events
        The library is given only the first so many of them: it takes its time. Its speed is told for these.
    seed
        The same seed makes the same log.
    json_file
        Where to write all figures.

    """
    events -= events % FACTS_OF_A_JOB
    console = Console()
    found = machine()
    print_machine(found, console)
    with tempfile.TemporaryDirectory(prefix="lookup-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with running_servers(folder, with_rabbitmq=False) as servers, servers.corner(Transport.REDIS) as corner:
            _fill(corner, events, seed, console)
            runs = _run_all(corner, events, min(events, library_events), folder, console)
    _print(runs, console)
    if json_file is not None:
        whole = {"machine": found, "runs": {run: asdict(replayed) for run, replayed in runs.items()}}
        json_file.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


def _fill(corner: Corner, events: int, seed: int, console: Console) -> None:
    began = time.monotonic()
    fill(corner.database_owner_url, events, seed)
    with psycopg.connect(corner.database_owner_url) as conn:
        row = conn.execute("SELECT pg_database_size(current_database())").fetchone()
    assert row is not None
    console.print(f"{events:,} facts, {row[0] / 1e6:,.0f} MB in PostgreSQL, made in {time.monotonic() - began:.0f} s")


def _run_all(corner: Corner, events: int, library_events: int, folder: Path, console: Console) -> dict[str, Replayed]:
    runs: dict[str, Replayed] = {}

    def run(name: str, verb: str, facts: int, **options: Any) -> None:
        urls = {"database_url": corner.database_owner_url, "redis_url": corner.redis_url}
        child = start(MODULE, verb, name, {**urls, "facts": facts, **options}, folder)
        try:
            runs[name] = Replayed(**child.wait_until_told(DONE_WITHIN_S))
        finally:
            child.stop()
        console.print(f"{name}: {facts:,} facts, {runs[name].per_s:,.0f} a second")

    run(LIBRARY_LAX, "library", library_events, commit="off")
    run(LIBRARY, "library", library_events, commit="on")
    with redis.Redis.from_url(corner.redis_url) as views:
        run(ALL_VIEWS, "ours", events, views="all")
        views.flushdb()
        run(OURS, "ours", events, views=JOB_STATUS)
        same = _same_documents(corner.database_owner_url, views)
    console.print(f"{same:,} documents of jobs that ended in both were compared, and are the same byte for byte.\n")
    return runs


def _same_documents(database_url: str, views: "redis.Redis") -> int:
    """How many documents both have of the same facts. Raises `BenchFailed` if one differs, or there are none."""
    generation = next(key.decode().split(":")[2] for key in views.scan_iter(f"{Keys().prefix}g*:meta"))
    same = 0
    with psycopg.connect(database_url) as conn, conn.cursor(name="documents", binary=True) as rows:
        rows.execute("SELECT job_id, document FROM job_documents")
        while page := rows.fetchmany(1_000):
            shown: Any = views.mget([Keys().job(generation, job_id) for job_id, _ in page])
            for (job_id, document), ours in zip(page, shown, strict=True):
                position, ours_position = document.partition(b"\n")[0], (ours or b"").partition(b"\n")[0]
                if position == ours_position and document != ours:
                    raise BenchFailed(f"The documents of job {job_id} differ.")
                same += document == ours
    if same == 0:
        raise BenchFailed("No document was made by both.")
    return same


def _print(runs: dict[str, Replayed], console: Console) -> None:
    table = Table("contender", box=None, pad_edge=False)
    for title in ("facts", "seconds", "facts/s", "times", "processor us a fact", "peak MB"):
        table.add_column(title, justify="right")
    slowest = runs[LIBRARY].per_s
    for name in (LIBRARY, LIBRARY_LAX, OURS, ALL_VIEWS):
        run = runs[name]
        numbers = (f"{run.facts:,}", f"{run.seconds:.1f}", f"{run.per_s:,.0f}", f"{run.per_s / slowest:.1f}")
        table.add_row(name, *numbers, f"{1e6 * run.processor_s / run.facts:.1f}", f"{run.peak_mb:.0f}")
    console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(app(result_action="return_value"))
    except (BenchFailed, EmbeddedError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
