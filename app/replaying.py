"""What `lookup replay` does: rebuild, compare, tell, show. It reads the log and writes to the views' Redis, nowhere else."""

import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from app.logs import set_up_logs
from app.running import run_loop, settings_of_running
from app.settings import Settings
from app.wiring import Wiring, utc_now
from events.store import StoreUnavailable
from projections import replay as replaying
from projections.comparison import ADDED, CHANGED, GONE, SAME, Comparer, Differences, Digest, NotAtRest
from projections.generations import RedisGenerations
from projections.job_views import Terms, View
from projections.replay import CannotReplay, Progress, Rebuild, leading
from projections.table import PROJECTIONS
from projections.view_store import Standing
from results.documents import ResultsUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_EVERY_S = 2.0
NOTHING_GIVEN = "LOOKUP_REDIS_URL and LOOKUP_DATABASE_URL must be set, or `lookup up` must run on the data folder."
UNREACHABLE = "The database or Redis cannot be reached. What was built is kept: run it again to go on."

OUTRUN = ", and the log grows faster: run it again with a higher --rate or when less comes in, it goes on where it was"


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be replayed, and how. No views: all of them."""

    views: tuple[str, ...] = ()
    dry_run: bool = False
    rate: float | None = None
    keep_minutes: float = 10.0

    @property
    def table(self) -> Sequence[View]:
        return [view for view in PROJECTIONS if not self.views or view.name in self.views]

    @property
    def keep(self) -> timedelta:
        return timedelta(minutes=self.keep_minutes)


@dataclass(slots=True)
class Outcome:
    """What a replay came to. `digest_shown` and `digest_new` are there if the views were at rest for a moment."""

    generation: str
    resumed: bool
    position: int
    events: int
    seconds: float
    views: dict[str, Differences]
    digest_shown: Digest | None = None
    digest_new: Digest | None = None
    shown: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def problem_of(wish: Wish, *, rollback: bool) -> str | None:
    """What is wrong with a wish, for who wished it."""
    known = {view.name for view in PROJECTIONS}
    if not set(wish.views) <= known:
        return f"A view is one of {', '.join(sorted(known))}."
    if wish.rate is not None and not wish.rate >= 1:
        return "A rate is a number of events a second, at least 1."
    if not 0 <= wish.keep_minutes <= 24 * 60:
        return "--keep is a number of minutes, of a day at most."
    if rollback and (wish.dry_run or wish.rate is not None):
        return "--rollback builds nothing: it takes neither --dry-run nor --rate."
    return None


def replay(data_dir: Path | None, wish: Wish, *, as_json: bool) -> int:
    return _run(data_dir, lambda wiring: _replay(wiring, wish, as_json=as_json))


def roll_back(data_dir: Path | None, wish: Wish, *, as_json: bool) -> int:
    return _run(data_dir, lambda wiring: _roll_back(wiring, wish, as_json=as_json))


def _run(data_dir: Path | None, work: Callable[[Wiring], Awaitable[int]]) -> int:
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)
    settings = settings_of_running(settings)
    if settings.redis_url is None or not (settings.database_read_url or settings.database_url):
        return _refused(NOTHING_GIVEN, 3)

    async def run() -> int:
        wiring = Wiring(settings)
        try:
            return await work(wiring)
        except (CannotReplay, NotAtRest) as why:
            return _refused(str(why), 1)
        except (StoreUnavailable, ResultsUnavailable, RedisError, OSError):
            return _refused(UNREACHABLE, 3)
        finally:
            await wiring.aclose()

    return run_loop(run())


async def _replay(wiring: Wiring, wish: Wish, *, as_json: bool) -> int:
    generations = RedisGenerations(wiring.redis, wiring.keys)
    await _must_be_of_our_version(wiring, wish.table)
    documents = await wiring.past_documents()
    console = Console(stderr=as_json)
    async with leading(generations) as fence:
        with _telling(console) as tell:
            rebuild = Rebuild(
                fence=fence,
                generations=generations,
                log=wiring.history,
                documents=documents.get,
                views=wish.table,
                terms=Terms(wiring.settings.rules, wiring.settings.retention),
                now=utc_now,
                rate=wish.rate,
                tell=tell,
            )
            await rebuild.open()
            await rebuild.build()
        outcome = await _compared(wiring, rebuild, await generations.standing())
        _print(outcome, console)
        if wish.dry_run:
            await rebuild.drop()
        else:
            await rebuild.show(wish.keep)
            outcome.shown = True
    console.print(_conclusion(wish))
    if as_json:
        print(json.dumps(outcome.as_json()))  # noqa: T201 - a command prints
    return 0


async def _must_be_of_our_version(wiring: Wiring, table: Sequence[View]) -> None:
    """Views of another version would be given up by the projector that runs, which could not feed them."""
    standing = await wiring.views.standing()
    if not await wiring.redis.exists(wiring.keys.lease):
        return
    for view in table:
        shown = standing.of(view.name)
        told = None if shown is None else shown.views.get(view.name)
        if told is not None and told.rpartition(".")[2] != str(view.version):
            raise CannotReplay(
                f"The projector that runs makes version {told} of {view.name}, this program version {view.version}. "
                "Start a projector of this version: it builds the views by itself, and shows them when they are there."
            )


async def _compared(wiring: Wiring, rebuild: Rebuild, standing: Standing) -> Outcome:
    """The new views against what is shown of the same log."""
    log_id = str(await wiring.history.log_id())
    shown = {
        view.name: one.name
        for view in rebuild.views
        if (one := standing.of(view.name)) is not None and one.log_id == log_id and one.name != rebuild.name
    }
    comparer = Comparer(wiring.redis, wiring.keys)
    views = await comparer.compare(shown, rebuild.name)
    outcome = Outcome(rebuild.name, rebuild.resumed, rebuild.position, rebuild.folded, rebuild.seconds, views)
    try:
        outcome.digest_new = await comparer.digest({view.name: rebuild.name for view in rebuild.views})
        outcome.digest_shown = await comparer.digest(shown) if len(shown) == len(rebuild.views) else None
    except NotAtRest:
        outcome.digest_new = None
    return outcome


async def _roll_back(wiring: Wiring, wish: Wish, *, as_json: bool) -> int:
    generations = RedisGenerations(wiring.redis, wiring.keys)
    async with leading(generations) as fence:
        views = await replaying.roll_back(fence, generations, wish.table, wish.keep, utc_now())
    if as_json:
        print(json.dumps({"views": views}))  # noqa: T201 - a command prints
    else:
        Console().print(f"Shown as before again: {', '.join(views)}. `lookup replay --rollback` goes back the other way.")
    return 0


# --- What people see --------------------------------------------------------------------------------------------------


@contextmanager
def _telling(console: Console) -> "Iterator[Callable[[Progress], None]]":
    """A bar on a terminal, elsewhere a line now and then."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Replaying", told="")
        yield lambda made: bar.update(task, completed=made.position, total=made.goal, told=_told(made))


def _lines(console: Console) -> Callable[[Progress], None]:
    told_at = time.monotonic()

    def tell(made: Progress) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= LINE_EVERY_S:
            told_at = time.monotonic()
            console.print(_told(made))

    return tell


def _told(made: Progress) -> str:
    left = "" if made.left_s is None else f", {made.left_s:,.0f} s left"
    left = OUTRUN if made.outrun else left
    return f"position {made.position:,} of {made.goal:,}, {made.per_s:,.0f} events/s{left}"


def _print(outcome: Outcome, console: Console) -> None:
    rate = outcome.events / outcome.seconds if outcome.seconds else 0.0
    again = ", going on with what was left half-built" if outcome.resumed else ""
    console.print(f"Folded {outcome.events:,} events in {outcome.seconds:.1f} s ({rate:,.0f} events/s){again}.")
    if not outcome.views:
        console.print("Nothing is shown that they could be compared with.")
    else:
        _print_differences(outcome.views, console)
    if outcome.digest_new is not None:
        same = outcome.digest_shown is not None and outcome.digest_shown.hex == outcome.digest_new.hex
        told = "the same as of those that are shown" if same else "new"
        digest = outcome.digest_new
        console.print(f"Digest of {digest.keys:,} keys at position {digest.checkpoint:,}: {digest.hex[:16]}, {told}.")


def _print_differences(views: Mapping[str, Differences], console: Console) -> None:
    table = Table("view", SAME, CHANGED, ADDED, GONE, box=None, pad_edge=False)
    for name, found in views.items():
        table.add_row(name, *(f"{found.counts[kind]:,}" for kind in (SAME, CHANGED, ADDED, GONE)))
    console.print(table)
    for name, found in views.items():
        for kind, sample in found.samples.items():
            if sample:
                console.print(
                    f"{kind} in {name}, for example: {', '.join(key or '(all of it)' for key in sample)}", markup=False
                )


def _conclusion(wish: Wish) -> str:
    if wish.dry_run:
        return "Nothing was changed: --dry-run."
    if not wish.keep_minutes:
        return "Shown from now on."
    return f"Shown from now on. For {wish.keep_minutes:g} minutes `lookup replay --rollback` shows what was shown before."


def _refused(why: str, code: int) -> int:
    print(f"lookup: {why}", file=sys.stderr)  # noqa: T201 - for the person who asked
    return code
