"""Why a task brought no answer: every stable code there is. `docs/errors.md` tells each in full; a test holds the two together.

Programs act on these codes, so a code never changes its meaning. Facts keep them as plain text, which outlives this list.
"""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Who says it is in the comment, where it is not the lookup itself."""

    ADDRESS_REFUSED = "address_refused"  # The policy forbids the address, or one that the name leads to.
    ANSWER_TOO_LARGE = "answer_too_large"
    NAME_NOT_FOUND = "name_not_found"  # The domain has no address.
    NAME_RESOLUTION_FAILED = "name_resolution_failed"  # No name server gave an answer either way.
    NETWORK_UNREACHABLE = "network_unreachable"  # Our own host cannot send to the address.
    NO_LOCATION = "no_location"  # Private and reserved addresses are nowhere.
    NO_REPLY = "no_reply"  # Every echo was lost.
    NOT_FOUND = "not_found"  # The source was asked and has no entry.
    PROBE_NOT_PERMITTED = "probe_not_permitted"  # The kernel forbids the configured way to ping.
    RDAP_NO_SERVER = "rdap_no_server"
    TIMEOUT = "timeout"  # Somebody who was asked did not answer in time.
    UNPARSABLE_ANSWER = "unparsable_answer"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"

    INTERNAL_ERROR = "internal_error"  # The runner: the lookup has a fault.
    WORKER_CRASHED = "worker_crashed"  # The runner: the item came back again and again.

    QUOTA_EXHAUSTED = "quota_exhausted"  # The saga: the source's limit lasts longer than the job.
    UPSTREAM_DOWN = "upstream_down"  # The saga: the source keeps failing, and is left alone for longer than the job lasts.

    TIMED_OUT = "timed_out"  # The runner or the deadlines: the task's own time ran out.
    NOT_APPLICABLE = "not_applicable"  # Submission: the service has nothing to say about such a target.
    CANCELLED = "cancelled"
