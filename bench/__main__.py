"""`python -m bench`: jobs per second and the time of a single job, beside Celery and dramatiq on the same servers."""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pytest
from cyclopts import App, Parameter
from rich.console import Console

from app.embedded.failure import EmbeddedError
from bench.children import BenchFailed
from bench.contenders import CONTENDERS, OURS
from bench.load import Load
from bench.profiling import print_profile
from bench.report import Run, figures_of, machine, print_figures, print_machine
from bench.servers import Servers, Transport, running_servers

QUICK = Load(jobs=200, singles=30, warm_up=10)

app = App(name="bench", help="Measures jobs per second and the time of a single job, with lookups that do nothing.")


@app.default
def compare(
    *,
    jobs: int = 3_000,
    singles: int = 200,
    rounds: int = 3,
    submitters: int = 64,
    transport: Annotated[list[Transport] | None, Parameter(negative=())] = None,
    only: str = "",
    quick: bool = False,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> int:
    """Measure all contenders in turn, several rounds, and print medians.

    Parameters
    ----------
    jobs
        Jobs handed in at once, in each measurement.
    singles
        Jobs handed in one after the other on an idle system, in each measurement.
    rounds
        How often each contender is measured.
    submitters
        HTTP connections that hand in jobs side by side.
    transport
        redis or rabbitmq; may be repeated. Both if not given.
    only
        Only contenders whose name contains this.
    quick
        One round of 200 jobs: does it work at all?
    json_file
        Where to write all figures.

    """
    load = QUICK if quick else Load(jobs, singles, warm_up=50, submitters=submitters)
    transports = transport or list(Transport)
    console = Console()
    found = machine()
    print_machine(found, console)
    with _folder_and_servers(transports) as (folder, servers):
        runs = _measure_all(1 if quick else rounds, transports, only, load, folder, servers, console)
    figures = figures_of(runs)
    console.print()
    print_figures(figures, console)
    if json_file is not None:
        whole = {"machine": found, "load": asdict(load), "figures": list(map(asdict, figures)), "runs": list(map(asdict, runs))}
        json_file.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


@app.command
def profile(*, jobs: int = 3_000, transport: Transport = Transport.REDIS, layout: str = "two processes") -> int:
    """Show where our processes' time goes under load.

    Parameters
    ----------
    jobs
        Jobs handed in at once.
    transport
        redis or rabbitmq.
    layout
        "one process" or "two processes".

    """
    console = Console(width=160)
    contender = next(one for one in OURS if one.name.endswith(layout))
    with _folder_and_servers([transport]) as (folder, servers), servers.corner(transport) as corner:
        measured = contender.measure(corner, Load(jobs, singles=0, warm_up=20), folder / "run", sampled=True)
        used = ", ".join(f"{name} {1000 * seconds / jobs:.2f}" for name, seconds in measured.processor_s.items())
        console.print(f"{measured.jobs_per_s:,.0f} jobs/s while sampled; processor ms per job: {used}")
        print_profile(folder / "run", measured, console)
    return 0


def _measure_all(
    rounds: int, transports: Sequence[Transport], only: str, load: Load, folder: Path, servers: Servers, console: Console
) -> list[Run]:
    """In turn, so that what else the machine does in the meantime meets all of them alike."""
    runs: list[Run] = []
    for number in range(1, rounds + 1):
        for transport in transports:
            for contender in CONTENDERS:
                if only not in contender.name:
                    continue
                with servers.corner(transport) as corner:
                    measured = contender.measure(corner, load, folder / f"run-{len(runs) + 1}")
                runs.append(Run(number, transport, contender.name, measured))
                speeds = f"{measured.jobs_per_s:,.0f} jobs/s, p50 {measured.p50_ms:.1f} ms"
                console.print(f"round {number}, {transport}, {contender.name}: {speeds}")
    return runs


@contextmanager
def _folder_and_servers(transports: Sequence[Transport]) -> Iterator[tuple[Path, Servers]]:
    with tempfile.TemporaryDirectory(prefix="lookup-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with running_servers(folder, with_rabbitmq=Transport.RABBITMQ in transports) as servers:
            yield folder, servers


def _end_like_ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_like_ctrl_c)
    try:
        sys.exit(app(result_action="return_value"))
    except (BenchFailed, EmbeddedError, pytest.fail.Exception, pytest.exit.Exception) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
