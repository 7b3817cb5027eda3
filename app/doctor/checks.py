"""The table of all checks: what `lookup doctor` looks at, by which function, and what to do about a finding.

A check is a function from what is known of one thing (a stream, a job, the machinery) to its problems. Those in `OF_THE_WHOLE`
read much of their own: `app/doctor/examination.py` does them. `mendable` says that `--fix` helps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from app.doctor import jobs, machinery, stories
from app.doctor.findings import Problem
from app.doctor.jobs import Job
from app.doctor.machinery import About, Looks
from app.doctor.stories import Stream

Seen = TypeVar("Seen")
Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Check(Generic[Seen, Told]):
    """One promise: the name that its findings go by, how to look, and what to do when it is broken."""

    name: str
    look: Callable[[Seen], Iterator[Told]]
    to_do: str
    mendable: bool = False


TAMPERED = "Facts are never changed or taken out: find out who could, and compare with a backup."
BUG = "The program decided wrongly, or somebody else wrote to the log. Keep it and report it."
VIEW = "`lookup doctor --fix` puts the view right, from the job's facts."
SELF_CHECK = "See that `lookup keeper` runs; its log says what stops it. `lookup self-check` makes one now."

OF_A_STREAM: tuple[Check[Stream, Problem], ...] = (
    Check("version hole", stories.missing_versions, TAMPERED),
    Check("broken chain", stories.broken_links, TAMPERED),
    Check("unreadable fact", stories.unreadable_facts, "Upgrade this program if a newer one wrote it; else it was damaged."),
)
OF_A_JOBS_STREAM: tuple[Check[Stream, Problem], ...] = (
    Check("facts out of order", stories.out_of_order, BUG),
    Check("fact after the end", stories.facts_after_the_end, BUG),
    Check("outcome counted twice", stories.outcomes_counted_twice, BUG),
    Check("false ending", stories.false_endings, BUG),
)
OF_A_JOB: tuple[Check[Job, Problem], ...] = (
    Check("job past its deadline", jobs.past_its_deadline, "See that `lookup saga` runs; `--fix` ends the job.", mendable=True),
    Check("task never answered", jobs.never_answered, "See that `lookup saga` runs; `--fix` does what is due.", mendable=True),
    Check("result missing", jobs.missing_results, "Put it back from a backup of result_documents: it is nowhere else."),
    Check("view missing", jobs.missing_view, VIEW, mendable=True),
    Check("view differs", jobs.different_view, VIEW, mendable=True),
    Check("view of a wrong age", jobs.view_of_a_wrong_age, VIEW, mendable=True),
    Check("wrong to-do", jobs.wrong_on_the_to_do_list, "`lookup doctor --fix` puts the list right.", mendable=True),
)
OF_THE_MACHINERY: tuple[Check[Looks, About], ...] = (
    Check("no relay", machinery.no_relay, "Start `lookup relay`."),
    Check("relay behind", machinery.relay_behind, "See that the broker is there; the relay's log says what stops it."),
    Check("no projector", machinery.no_projector, "Start `lookup projector`."),
    Check("projection behind", machinery.projection_behind, "See that `lookup projector` runs; its log says what stops it."),
    Check("views of another log", machinery.views_of_another_log, "Restart `lookup projector`: it builds them anew."),
    Check("self-check failed", machinery.self_check_failed, "`lookup replay` builds the view anew; then `lookup self-check`."),
    Check("self-check overdue", machinery.self_check_overdue, SELF_CHECK),
    Check("part retrying", machinery.parts_retrying, "Its log says what it misses."),
    Check("old dead letter", machinery.old_dead_letters, "`lookup dead-letters list`, then retry or discard."),
)


@dataclass(frozen=True, slots=True)
class WholeCheck:
    """A check of many things at once."""

    name: str
    to_do: str
    mendable: bool = False


WRONG_LOG_HEAD = WholeCheck("wrong log head", TAMPERED)
ORPHAN_KEY = WholeCheck("orphan key", "`lookup doctor --fix` removes it.", mendable=True)
UNKNOWN_TO_DO = WholeCheck("unknown to-do", "`lookup doctor --fix` takes it off the list.", mendable=True)
OF_THE_WHOLE = (WRONG_LOG_HEAD, ORPHAN_KEY, UNKNOWN_TO_DO)

CHECKS: tuple[Check[Any, Any] | WholeCheck, ...] = (
    *OF_A_STREAM,
    *OF_A_JOBS_STREAM,
    *OF_A_JOB,
    *OF_THE_MACHINERY,
    *OF_THE_WHOLE,
)
TO_DO = {check.name: check.to_do for check in CHECKS}
MENDABLE = frozenset(check.name for check in CHECKS if check.mendable)
