"""Where views lie: the projector's end of it, as an interface and on Redis. `projections/views.py` has key names and scripts.

Promises, held by `tests/contract/test_view_store.py` for Redis and the in-memory twin alike:

- **One leader.** The lead is a lease that every commit renews; who fell silent for longer than it lasts is fenced off.
- **All or nothing.** A commit moves the views and checkpoints of all generations that are fed in one step, or moves nothing.
- **No gap.** A commit is refused unless fence, roster, log id and every checkpoint are what the store holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import groupby, islice
from typing import Any, ClassVar, Protocol, cast
from uuid import UUID, uuid4

from redis.asyncio import Redis
from redis.exceptions import RedisError

from projections.folding import Folded
from projections.views import ARRANGE, BEGIN, COMMIT, DEADLINES, DUE, JOB_STATUS, LEAD, STANDING, Keys
from projections.writes import Count, Expire, KeepLast, Put, Rank, Remove, Unrank, UnrankBelow, Write

LEASE_MS = 5_000
DUE_LIST_GOOD_FOR_MS = 10_000
"""How far the to-do list may be behind. A job that is not in it yet has nothing due for longer than this."""
SWEEP_PAGE = 1_000
SWEEP_PAGES = 10
TOGETHER_MAX = 1_000
"""So many writes are told at once: a script can hand on only so many words."""
EXPIRE_MAX = 1_000
"""So many keys at least may go in one commit by the log's time."""


class Verdict(StrEnum):
    """What became of a commit: made, or refused because this is not what the store holds."""

    OK = "ok"
    FENCED = "fenced"
    GENERATION = "generation"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation, and how far it has come in which log. `checkpoint` is None when that was lost.

    `views` has the version of each view in it. `checked_ms`: when somebody last moved or looked after it (Unix ms).
    """

    name: str
    log_id: str | None
    checkpoint: int | None
    hash: str
    complete: bool
    views: Mapping[str, str]
    checked_ms: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """What the store shows and has fed: a generation for each view; `roster` is an id that is new at each change of both.

    `kept` is what is fed and not shown (generation, view), by the Unix ms until which it is. `before` is of which
    generation a view was shown before. `built` are generations that are being built, or were left half-built.
    """

    roster: str = ""
    live: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[tuple[str, str], int] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    fed: Sequence[Generation] = ()
    built: Sequence[Generation] = ()

    def of(self, view: str) -> Generation | None:
        """The generation that a view is shown of."""
        return next((generation for generation in self.fed if generation.name == self.live.get(view)), None)


@dataclass(frozen=True, slots=True)
class Fed:
    """A generation as a commit expects it, and the views that are fed of it. One that is ahead is passed by."""

    name: str
    checkpoint: int
    views: frozenset[str]


@dataclass(frozen=True, slots=True)
class Move:
    """From the checkpoint that we believe in to the next, with what was folded in between. Times are Unix ms.

    `fed` has to be all generations that the store wants to be fed.
    """

    fence: str
    roster: str
    log_id: str
    fed: Sequence[Fed]
    stood_at: int
    position: int
    hash: str
    complete: bool
    caught_up_ms: int
    checked_ms: int
    folded: Folded

    @property
    def message(self) -> str:
        """What is told on `Keys.moved`: the checkpoint and the jobs that ended; nothing when it has not moved."""
        return "" if self.position == self.stood_at else " ".join([str(self.position), *map(str, self.folded.ended)])

    @property
    def ended_alone(self) -> str:
        """The job that ended, when it was only one: its view is told as well, so that who waits need not ask for it."""
        return str(self.folded.ended[0]) if len(self.folded.ended) == 1 else ""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of what is fed and shown.

    `MARK`: a view's version is told anew; it is not what one version alone would have made of it any more.
    `RETIRE`: a view that is not shown is not fed any more. `LOSE`: nor is any of a generation, nor shown.
    """

    MARK: ClassVar = "mark"
    RETIRE: ClassVar = "retire"
    LOSE: ClassVar = "lose"

    kind: str
    generation: str
    view: str = ""
    version: str = ""


class ViewStore(Protocol):
    """The store of the views, as projectors see it. An unreachable one raises what its driver raises: the projector ends."""

    async def lead(self) -> str | None:
        """Our fence, when we lead from now on; None while somebody else leads."""

    async def standing(self) -> Standing: ...

    async def begin(self, fence: str, generation: str, log_id: str, views: Mapping[str, int]) -> bool:
        """Start an empty generation of these views (and their versions), and show it. False when we do not lead."""

    async def commit(self, move: Move) -> Verdict: ...

    async def arrange(self, fence: str, roster: str, changes: Sequence[Change]) -> Verdict:
        """Make changes to what is fed and shown, if the roster is still this one."""

    async def sweep(self) -> None:
        """Remove some of what was dropped, within a bound."""


@dataclass
class RedisViews:
    """The `ViewStore` on Redis."""

    redis: Redis
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        self._lead = self.redis.register_script(LEAD)
        self._standing = self.redis.register_script(STANDING)
        self._begin = self.redis.register_script(BEGIN)
        self._commit = self.redis.register_script(COMMIT)
        self._arrange = self.redis.register_script(ARRANGE)
        self._sweeping = ""
        self._cursor = 0

    async def lead(self) -> str | None:
        return _text(await self._lead(keys=[self.keys.lease, self.keys.fence], args=[LEASE_MS, uuid4().hex]))

    async def standing(self) -> Standing:
        own = self.keys
        keys = [own.roster, own.live, own.kept, own.before, own.fed, own.built]
        roster, live, kept, before, fed, built = await self._standing(keys=keys, args=[own.prefix])
        return Standing(
            roster=_text(roster) or "",
            live=_mapping(live),
            kept={_generation_and_view(name): int(until_ms) for name, until_ms in _mapping(kept).items()},
            before=_mapping(before),
            fed=[_generation(*told) for told in fed],
            built=[_generation(*told) for told in built],
        )

    async def begin(self, fence: str, generation: str, log_id: str, views: Mapping[str, int]) -> bool:
        own = self.keys
        keys = [own.lease, own.roster, own.live, own.fed, own.dropped, own.meta(generation), own.kept, own.before]
        versions = [text for view in views.items() for text in view]
        return bool(await self._begin(keys=keys, args=[fence, uuid4().hex, generation, log_id, *versions]))

    async def commit(self, move: Move) -> Verdict:
        return await self.commit_under(self.keys.lease, self.keys.roster, move, LEASE_MS, shown=True)

    async def arrange(self, fence: str, roster: str, changes: Sequence[Change]) -> Verdict:
        own = self.keys
        keys = [own.lease, own.roster, own.live, own.fed, own.kept, own.before, own.dropped]
        words = [word for one in changes for word in (one.kind, f"{one.generation}:{one.view}".rstrip(":"), one.version)]
        return Verdict(_text(await self._arrange(keys=keys, args=[fence, roster, uuid4().hex, own.prefix, *words])) or "")

    async def sweep(self) -> None:
        for _ in range(SWEEP_PAGES):
            dropped: Any = await self.redis.smembers(self.keys.dropped)
            if not dropped:
                return
            names = {name.decode() for name in dropped}
            if self._sweeping not in names:
                self._sweeping, self._cursor = min(names), 0
            base = f"{self.keys.prefix}{self._sweeping}"
            self._cursor, keys = await self.redis.scan(self._cursor, match=f"{base}:*", count=SWEEP_PAGE)
            await self.redis.unlink(base, *keys)
            if self._cursor == 0:
                await self.redis.srem(self.keys.dropped, self._sweeping)

    async def commit_under(self, lease: str, known: str, move: Move, lease_ms: int, *, shown: bool = False) -> Verdict:
        """`commit` under another lease. `known` is the key whose value `move.roster` tells; `shown`: readers are told."""
        names = list(move.folded.writes)
        writes = list(encoded(move.folded.writes))
        fed: list[str | int] = []
        for one in move.fed:
            held = "".join("1" if name in one.views else "0" for name in names)
            fed += [f"{self.keys.prefix}{one.name}", one.checkpoint, held]
        answer = await self._commit(
            keys=[lease, known, self.keys.live],
            args=[
                move.fence,
                move.roster,
                move.log_id,
                move.stood_at,
                move.position,
                move.hash,
                int(move.complete),
                move.caught_up_ms,
                move.checked_ms,
                move.folded.until_s,
                lease_ms,
                self.keys.moved,
                move.message if shown else "",
                EXPIRE_MAX + sum(map(len, move.folded.writes.values())),
                self.keys.prefix,
                JOB_STATUS,
                move.ended_alone,
                len(names),
                *names,
                len(move.fed),
                *fed,
                *writes,
            ],
        )
        return Verdict(_text(answer) or "")

    async def due(self, now: datetime, limit: int) -> Sequence[UUID] | None:
        """Ids of jobs with something due, at most `limit`; None when the list is absent or behind."""
        now_ms = int(now.timestamp() * 1000)
        asked = (now_ms, DUE_LIST_GOOD_FOR_MS, limit)
        try:
            due = await self.redis.eval(DUE, 1, self.keys.live, self.keys.prefix, DEADLINES, *asked)
        except (RedisError, OSError):
            return None
        return None if due is None else [UUID(job_id.decode()) for job_id in due]


def encoded(writes: Mapping[str, Sequence[Write]]) -> Iterator[bytes]:
    """Writes as the script `APPLY` reads them. Neighbours of one kind and key go together."""
    for number, of_view in enumerate(writes.values(), start=1):
        for (kind, key), alike in groupby(of_view, _kind_and_key):
            op, words_of = _SPELLINGS[kind]
            while some := list(islice(alike, TOGETHER_MAX)):
                words = [word for write in some for word in words_of(write)]
                yield from (op, b"%d" % number, _sub_key(key), b"%d" % len(words))
                yield from words


def _kind_and_key(write: Write) -> tuple[type[Write], str]:
    """A key that is written only once tells nothing of its neighbours: it is one of the words."""
    kind = type(write)
    return kind, "" if kind is Put or kind is Expire else write.key


def _sub_key(key: str) -> bytes:
    return b":" + key.encode() if key else b""


_SPELLINGS: Mapping[type[Any], tuple[bytes, Callable[[Any], Sequence[bytes]]]] = {
    Put: (b"put", lambda write: (_sub_key(write.key), write.value, b"%d" % write.expires_at_s)),
    Rank: (b"rank", lambda write: (b"%d" % write.score, write.member.encode())),
    Unrank: (b"unrank", lambda write: (write.member.encode(),)),
    Count: (b"count", lambda write: (write.field.encode(), b"%d" % write.by)),
    UnrankBelow: (b"below", lambda write: (b"%d" % write.score,)),
    KeepLast: (b"keep", lambda write: (b"%d" % write.n,)),
    Expire: (b"expire", lambda write: (_sub_key(write.key), b"%d" % write.at_s)),
    Remove: (b"remove", lambda _: ()),
}
"""What the script calls each kind of write, and the words that it needs of each."""


def _generation(name: bytes, meta: Sequence[bytes]) -> Generation:
    told = _mapping(meta)
    checkpoint = told.get("checkpoint")
    return Generation(
        name=name.decode(),
        log_id=told.get("log_id"),
        checkpoint=None if checkpoint is None else int(checkpoint),
        hash=told.get("hash", ""),
        complete=told.get("complete") == "1",
        views={field.removeprefix("view:"): version for field, version in told.items() if field.startswith("view:")},
        checked_ms=int(told.get("checked_ms", 0)),
    )


def _generation_and_view(name: str) -> tuple[str, str]:
    generation, _, view = name.partition(":")
    return generation, view


def _mapping(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [text.decode() for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return cast("bytes", value).decode()
