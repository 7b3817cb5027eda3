"""Accept: from a parsed request to facts in the log. The commit is the only commitment.

After it the answer is 202 with the job's id, whatever else is down: the job is safe and runs when the rest is back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from domain import saga
from domain.address_policy import AddressPolicy
from domain.commands import Rules, SubmitLookup
from domain.services import rule_of
from events.facts import Service, SkipReason, Target, TargetType
from events.record import Cause
from write_side.sagas import Sagas


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the client is told: the job's id, and the position from which on it can be read."""

    job_id: UUID
    position: int


@dataclass(frozen=True, slots=True)
class Submitter:
    """Takes jobs on. Raises what `EventStore.append` raises."""

    sagas: Sagas
    policy: AddressPolicy
    rules: Rules
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    tenant: str

    async def submit(
        self,
        job_id: UUID,
        target: Target,
        services: Sequence[Service],
        cause: Cause,
        *,
        requested_by: str | None,
        timeout_s: float | None = None,
    ) -> Accepted:
        command = SubmitLookup(
            job_id=job_id,
            tenant=self.tenant,
            target=target,
            services=services,
            refusals=self._refusals(target, services),
            command_ids={service: self.new_id() for service in services},
            requested_by=requested_by,
            now=self.now(),
            timeout_s=timeout_s,
        )
        facts = saga.submit(command, self.rules)
        head = await self.sagas.begin(command.job_id, facts, cause)
        return Accepted(command.job_id, head.position)

    def _refusals(self, target: Target, services: Sequence[Service]) -> dict[Service, tuple[SkipReason, str]]:
        """The services that will not be asked, and why: known beforehand, so that no worker need find out."""
        refusals: dict[Service, tuple[SkipReason, str]] = {}
        for service in services:
            rule = rule_of(service)
            not_applicable = rule.refusal_of(target.type)
            if not_applicable is not None:
                refusals[service] = (SkipReason.NOT_APPLICABLE, not_applicable)
            elif target.type is TargetType.IP_ADDRESS:
                judge = self.policy.refusal_to_probe if rule.probes else self.policy.refusal_to_ask_about
                refusal = judge(target.canonical)
                if refusal is not None:
                    refusals[service] = (SkipReason.POLICY, refusal)
        return refusals
