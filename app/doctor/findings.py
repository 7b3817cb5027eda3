"""What `lookup doctor` says: which promise is broken, by what, and what was examined."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

KEPT_MAX = 1_000
"""So many findings of one check are kept and shown; all of them are counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One sentence about what is wrong; the position of the fact at fault where one is."""

    sentence: str
    position: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise. `about` is a job id, a stream id, a key of Redis, a part, or the name of a checkpoint."""

    check: str
    about: str
    problem: str
    position: int | None = None


@dataclass(slots=True)
class Examined:
    """How much was looked at. `log_head` is the position of the last fact when it began, `self_check` what the last
    self-check of this log came to.
    """

    log_head: int = 0
    facts: int = 0
    jobs: int = 0
    views: int = 0
    results: int = 0
    keys: int = 0
    seconds: float = 0.0
    self_check: "SelfChecked | None" = None


@dataclass(frozen=True, slots=True)
class SelfChecked:
    """When the last self-check was (ISO 8601), how many documents it compared, and how many of them differed."""

    at: str
    compared: int
    differing: int


@dataclass(frozen=True, slots=True)
class Mended:
    """What `--fix` did about a finding."""

    check: str
    about: str
    did: str


@dataclass
class Report:
    """All that a run found. `unexamined` names what could not be looked at, and why."""

    examined: Examined = field(default_factory=Examined)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    unexamined: dict[str, str] = field(default_factory=dict)
    mended: list[Mended] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.counts[finding.check] += 1
            kept = self.findings.setdefault(finding.check, [])
            if len(kept) < KEPT_MAX:
                kept.append(finding)

    @property
    def broken(self) -> int:
        """So many findings are left: those that were mended are not."""
        return self.counts.total() - len(self.mended)

    @property
    def exit_code(self) -> int:
        """1 when something is broken, else 3 when something could not be examined, else 0."""
        if self.broken:
            return 1
        return 3 if self.unexamined else 0

    def as_json(self) -> dict[str, Any]:
        return {
            "healthy": self.exit_code == 0,
            "examined": asdict(self.examined),
            "counts": dict(self.counts),
            "findings": [asdict(finding) for kept in self.findings.values() for finding in kept],
            "unexamined": [{"what": what, "why": why} for what, why in self.unexamined.items()],
            "mended": [asdict(mended) for mended in self.mended],
        }
