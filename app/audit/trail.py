"""A trail of heads, from the table or a file: is each signed, and none missing, changed or put in?

Read twice: once to judge it, and once along the log. What is kept of it meanwhile is a number and a digest for each head.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from events.chain import GENESIS
from events.heads import CHECKSUM_BYTES, Head, PublicKeys, UnreadableHead, is_signed, read_head

PROBLEMS_MAX = 100

Lines = Callable[[], AsyncIterator[str]]
"""Reads the trail from its beginning."""


@dataclass
class Trail:
    """The heads of one place, `name`. `judge` first; then `along` gives those that vouch for the log as it is now."""

    name: str
    lines: Lines
    keys: PublicKeys
    problems: list[str] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    last: Head | None = None
    _good: set[int] = field(default_factory=set)

    async def judge(self) -> None:
        """Look at every line; what is wrong is in `problems`."""
        line_number = 0
        async for line in self.lines():
            line_number += 1
            try:
                head = read_head(line)
            except UnreadableHead:
                # Half a line that a crash left is no loss: if it was a head, its number is missing now.
                if line.endswith("}"):
                    self._tell(f"line {line_number} is no head, or was changed")
                continue
            self._judge(head)

    async def along(self) -> AsyncIterator[Head]:
        """The heads that are sound and were not given up by a restore, in the order of the log."""
        async for line in self.lines():
            try:
                head = read_head(line)
            except UnreadableHead:
                continue
            if head.number in self._good and self.digests[head.number] == head.digest:
                yield head

    def _judge(self, head: Head) -> None:
        if not is_signed(head, self.keys):
            known = head.key_id in self.keys
            self._tell(f"head {head.number} is not signed by {head.key_id}" if known else _unknown_key(head))
            return
        problem = self._breaks(head)
        if problem is not None:
            self._tell(problem)
        if self.last is not None and head.number <= self.last.number:
            return
        if head.restored_from is not None:
            self._good = {number for number in self._good if number <= head.restored_from[1]}
        self._good.add(head.number)
        self.digests[head.number] = head.digest
        self.last = head

    def _breaks(self, head: Head) -> str | None:
        """What is wrong with a head behind the last one."""
        last = self.last
        number, digest, base = (last.number, last.digest, last.state) if last else (0, GENESIS.hex(), None)
        if head.number <= number:
            return f"head {head.number} comes after head {number}"
        if head.restored_from is not None and number == head.restored_from[1]:
            # In the table of a restored log. The heads in between were of facts that are lost.
            return None
        if head.number > number + 1:
            return f"{_heads(number + 1, head.number - 1)} missing"
        if head.previous != digest:
            return f"head {head.number} does not follow head {number}"
        if head.restored_from is not None:
            return None
        if last is not None and head.log_id != last.log_id:
            return f"head {head.number} is of another log"
        facts = head.state.tree.size - (base.tree.size if base else 0)
        if len(head.checksums) != CHECKSUM_BYTES * facts:
            return f"head {head.number} has checksums of another number of facts"
        return None

    def _tell(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(f"{self.name}: {problem}.")


def compared(one: Trail, other: Trail) -> list[str]:
    """What two trails of the same log do not have in common."""
    differing = [number for number in one.digests.keys() & other.digests.keys() if one.digests[number] != other.digests[number]]
    problems = [
        f"head {number} is another one in {one.name} than in {other.name}." for number in sorted(differing)[:PROBLEMS_MAX]
    ]
    for trail, reference in ((one, other), (other, one)):
        last = max(reference._good, default=0)  # noqa: SLF001 - of the same class
        if last > max(trail.digests, default=0):
            problems.append(f"{trail.name} ends with head {max(trail.digests, default=0)}, {reference.name} with head {last}.")
    return problems


def _unknown_key(head: Head) -> str:
    return f"head {head.number} is signed by {head.key_id}, which is none of the keys that are known"


def _heads(first: int, last: int) -> str:
    return f"head {first} is" if first == last else f"heads {first} to {last} are"
