"""`lookup doctor --fix`: puts right what can be put right without losing or changing a fact.

A job that the clock should have brought on gets the facts that are due, with who and why in their envelopes. A view is put
right in place, from its job's facts, if it is still the wrong one. Keys that belong to nobody are removed. All of this is
decided anew, on what is there now: a finding that has healed meanwhile changes nothing.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID

from app.doctor import checks, look
from app.doctor.examination import Examination
from app.doctor.findings import Finding, Mended, Report
from app.doctor.jobs import folded_to, lacks_results, references_of
from app.doctor.keyspace import KEYS_PAGE, generations_in_use, raw, shown_generation
from app.doctor.redis_keys import all_of, generation_of
from app.doctor.stories import stream_of
from projections import deadlines
from projections.job_status import expires_at_s, value_of
from projections.job_views import Terms
from projections.views import DEADLINES
from write_side.deadlines import Deadlines

Cure = Callable[[Finding], Awaitable[str | None]]
"""Does something about a finding; gives what it did in a sentence, None when there was nothing to do any more."""


@dataclass
class Mender:
    """Mends what an examination found. Raises what the servers raise when they cannot be reached."""

    examination: Examination
    deadlines: Deadlines
    actor: str
    reason: str | None

    @cached_property
    def cures(self) -> Mapping[str, Cure]:
        """By check, in the order in which they are done: facts first, then what is made of them."""
        by_facts = dict.fromkeys(("job past its deadline", "task never answered"), self._bring_on)
        of_views = dict.fromkeys(("view missing", "view differs", "view of a wrong age", "wrong to-do"), self._put_right)
        return {**by_facts, **of_views, checks.ORPHAN_KEY.name: self._remove, checks.UNKNOWN_TO_DO.name: self._forget}

    async def mend(self, report: Report) -> None:
        """What was done is added to the report."""
        for check, cure in self.cures.items():
            found = report.findings.get(check, ())
            for finding in {finding.about: finding for finding in found}.values():
                did = await cure(finding)
                if did is not None:
                    report.mended += [Mended(check, other.about, did) for other in found if other.about == finding.about]

    async def _bring_on(self, finding: Finding) -> str | None:
        reason = self.reason or f"lookup doctor found: {finding.check}."
        relayed_until = await self.deadlines.relayed_until(self.examination.now())
        facts = await self.deadlines.expire(UUID(finding.about), relayed_until, actor=self.actor, reason=reason)
        return f"Appended {_in_words(type(fact).__name__ for fact in facts)}." if facts else None

    async def _put_right(self, finding: Finding) -> str | None:
        """The right view and to-do for the facts up to the checkpoint, unless a later fact was folded meanwhile."""
        own, job_id = self.examination, UUID(finding.about)
        shown = await look.look_at(own.redis, own.keys, [job_id])
        rows = (await own.store.read([job_id])).get(job_id)
        if shown is None or rows is None:
            return None
        stream = stream_of(job_id, rows)
        documents = await own.documents.get(references_of(stream))
        views = folded_to(stream, shown.checkpoint, documents, Terms(own.rules, own.retention))
        if views is None or not shown.to_do_list:
            return None
        shown_now = shown.jobs[job_id].value
        # A view that shows a result which the store has lost may be the last copy.
        value = shown_now if shown_now is not None and lacks_results(views) else value_of(views)
        due_ms = deadlines.due_ms(views.saga, own.rules)
        put_right = await own.redis.eval(
            look.PUT_RIGHT,
            3,
            *(own.keys.live, own.keys.job(shown.generation, job_id), own.keys.deadlines(shown.to_do_list)),
            *(shown.generation, shown_now or b"", value, expires_at_s(views.status, own.retention)),
            *(str(job_id), "" if due_ms is None else due_ms, shown.to_do_list),
        )
        return f"Put its view right, as of position {views.position}." if put_right else None

    async def _remove(self, finding: Finding) -> str | None:
        own = self.examination
        generation = generation_of(finding.about, own.keys)
        if generation is None or finding.about != all_of(generation, own.keys):
            return "Removed the key." if await own.redis.unlink(raw(finding.about)) else None
        removed = 0
        async for key in own.redis.scan_iter(all_of(generation, own.keys), count=KEYS_PAGE):
            if generation in await generations_in_use(own.redis, own.keys):
                break
            removed += await own.redis.unlink(key)
        return f"Removed {removed} keys." if removed else None

    async def _forget(self, finding: Finding) -> str | None:
        own = self.examination
        live = await shown_generation(own.redis, own.keys, DEADLINES)
        removed: Any = await own.redis.zrem(own.keys.deadlines(live), raw(finding.about)) if live else 0
        return "Took it off the list." if removed else None


def _in_words(names: Iterable[str]) -> str:
    return ", ".join(names)
