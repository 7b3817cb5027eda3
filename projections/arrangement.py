"""What a projector does about the generations that it finds: which views it feeds, and what has to be put right first. Pure.

The version of a view in a generation is told as `2`, or as `2.3`: made by version 2, and fed by version 3 since, or left
alone by it. Neither version would have made that of the log, so whoever comes next builds the view anew beside it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from projections.job_views import View
from projections.view_store import Change, Generation, Standing


def fed_views(generation: Generation, table: Sequence[View]) -> frozenset[str]:
    """The views of a generation that this program may write to.

    A view that is written whole, job by job, is fed by a newer version as well: until that is built, who polls sees new
    jobs. What counts or ranks fact by fact would be neither the one nor the other: it stands still.
    """
    by_name = {view.name: view for view in table}
    return frozenset(name for name, told in generation.views.items() if name in by_name and _may_feed(by_name[name], told))


def outdated(standing: Standing, table: Sequence[View]) -> list[View]:
    """The views that have to be built: not shown at all, or not as this version makes them."""
    return [view for view in table if _told(standing.of(view.name), view.name) != str(view.version)]


def changes(standing: Standing, ours: Collection[str], table: Sequence[View], now_ms: int) -> Iterator[Change]:
    """What has to be put right before anything may be fed. `ours` are the generations that stand in our log."""
    for generation in standing.fed:
        if generation.name not in ours:
            yield Change(Change.LOSE, generation.name)
        else:
            yield from _changes_of(generation, standing, {view.name: view for view in table}, now_ms)


def _changes_of(generation: Generation, standing: Standing, table: Mapping[str, View], now_ms: int) -> Iterator[Change]:
    for name, told in generation.views.items():
        version = table[name].version if name in table else 0
        is_shown = standing.live.get(name) == generation.name
        if not is_shown and (told != str(version) or standing.kept.get((generation.name, name), 0) <= now_ms):
            yield Change(Change.RETIRE, generation.name, name)
        elif is_shown and told.rpartition(".")[2] != str(version):
            yield Change(Change.MARK, generation.name, name, f"{told}.{version}")


def _may_feed(view: View, told: str) -> bool:
    return told == str(view.version) or view.of_fact is None


def _told(generation: Generation | None, view: str) -> str | None:
    return None if generation is None else generation.views.get(view)
