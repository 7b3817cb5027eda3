"""A client that submits steadily while things break, and what has to hold of its jobs afterwards.

"Accepted" is a 202 that arrived. A request whose answer was lost may have become a job or not.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import aiohttp

from tests.e2e import independent_check
from tests.e2e.journey import CLOSED, Client, Document, check_document
from tests.e2e.processes import until
from tests.e2e.served import NEIGHBOURS

FLOW_S = 60.0
SLACK_S = 10.0
UNANSWERED = (aiohttp.ClientError, TimeoutError, ConnectionError)


@dataclass
class Traffic:
    """Submits, looks at each job at once, and polls all of them to their end."""

    client: Client
    accepted: list[str] = field(default_factory=list)
    tried: int = 0

    async def submit(self, jobs: int, pace_s: float) -> None:
        """Until so many were accepted."""
        await self.submit_while(lambda: len(self.accepted) < jobs, pace_s)

    async def submit_while(self, goes_on: Callable[[], bool], pace_s: float) -> None:
        """Each is looked at in the instant after its 202, while others are submitted."""
        async with asyncio.TaskGroup() as looks:
            while goes_on():
                job_id = await self._submit_one(f"127.0.{NEIGHBOURS[self.tried % len(NEIGHBOURS)]}.1")
                if job_id is not None:
                    self.accepted.append(job_id)
                    looks.create_task(self.look(job_id))
                self.tried += 1
                await asyncio.sleep(pace_s)

    async def _submit_one(self, target: str) -> str | None:
        try:
            answer = await self.client.post({"target": target})
        except UNANSWERED:
            return None
        assert answer.status in {202, 503}, answer
        return str(answer.document["jobId"]) if answer.status == 202 else None

    async def has_come_to(self, *, accepted: int = 0, tried: int = 0) -> None:
        await until(lambda: len(self.accepted) >= accepted and self.tried >= tried, FLOW_S, "the traffic to go on")

    async def follow_all(self, within_s: float) -> None:
        """Until each accepted job is closed."""
        waiting = [job_id for job_id in self.accepted if job_id not in self.client.finished]
        try:
            async with asyncio.timeout(within_s):
                while waiting:
                    for job_id in waiting:
                        document = await self.look(job_id)
                        if document is not None and document["status"] in CLOSED:
                            self.client.finished[job_id] = document
                    waiting = [job_id for job_id in waiting if job_id not in self.client.finished]
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"{len(waiting)} jobs have not ended after {within_s:g} s: {waiting[:3]}") from None

    async def look(self, job_id: str) -> Document | None:
        """A poll. It may meet a part that is down, but it is never told that an accepted job does not exist."""
        try:
            answer = await self.client.get(f"/api/lookup/{job_id}")
        except UNANSWERED:
            return None
        assert answer.status in {200, 503}, f"job {job_id} was accepted: {answer}"
        if answer.status == 503:
            return None
        check_document(answer.document)
        document: Document = answer.document
        return document


def assert_ended_in_time(finished: Mapping[str, Document], lifetime_s: float) -> None:
    for job_id, document in finished.items():
        took = at(document["completedAt"]) - at(document["createdAt"])
        assert took.total_seconds() <= lifetime_s + SLACK_S, f"job {job_id} took {took}"


def assert_nothing_was_lost_on_its_way(finished: Mapping[str, Document]) -> None:
    """What a dead part had in hand came again by itself: no deadline had to ask a task a second time."""
    for job_id, document in finished.items():
        endings = {(result["status"], result["attempt"]) for result in document["results"]}
        assert endings == {("Succeeded", 1)}, f"job {job_id}: {document}"


def all_closed(database_url: str) -> bool:
    """Whether all jobs of the log have ended, also those whose 202 was lost."""
    log = independent_check.read_log(database_url)
    return all(stream[-1].name in independent_check.CLOSING for stream in log.jobs.values())


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)
