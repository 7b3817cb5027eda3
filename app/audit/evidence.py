"""Evidence: all facts of one job as they lie in the log, with what shows that they are in it and were signed.

A bundle is one JSON object. `app/audit/verify_evidence.py` checks it, alone and offline: give it away together with the bundle.
It tells nothing of other jobs but hashes.
"""

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from app.audit.auditing import Auditor, CannotAudit
from app.audit.rows import told_hash
from app.audit.verification import references_of
from events.facts import ResultReference
from events.heads import Head, LogState
from events.merkle import Paths, leaf_hash
from events.record import StoredFact
from events.store import HistoryReader
from write_side.heads import HeadTable

PAGE = 1_000
KIND = "distributed-lookup evidence"
VERIFIER = Path(__file__).with_name("verify_evidence.py")


async def evidence_of(auditor: Auditor, job_id: UUID, now: datetime) -> dict[str, Any]:
    """The bundle of a job. Facts that no head covers yet are in it without a proof. Raises `CannotAudit`."""
    log = auditor.wiring.history
    stream = await auditor.stream(job_id)
    async with auditor.table() as table:
        proofs, heads = await _proofs(log, table, stream)
    references = [reference for stored in stream for reference in references_of(stored)]
    return {
        "kind": KIND,
        "v": 1,
        "job_id": str(job_id),
        "log_id": str(await log.log_id()),
        "made_at": now.isoformat(),
        "facts": [_fact(stored, proofs.get(stored.position)) for stored in stream],
        "documents": _documents(references, await auditor.documents(references)),
        "heads": [head.members for head in heads],
        "keys": [orjson.loads(key.line) for key in auditor.keys().values()],
    }


async def _proofs(
    log: HistoryReader, table: HeadTable, stream: Sequence[StoredFact]
) -> tuple[dict[int, dict[str, Any]], list[Head]]:
    """For the position of each fact that a head covers, where it is in that head's tree; and those heads."""
    proofs: dict[int, dict[str, Any]] = {}
    heads: list[Head] = []
    for stored in stream:
        if stored.position in proofs:
            continue
        head = await table.covering(stored.position)
        if head is None:
            break
        heads.append(head)
        before = await table.before(head)
        own = [other.position for other in stream if stored.position <= other.position <= head.state.position]
        proofs |= await _under(log, before.state if before else LogState(), head, own)
    return proofs, heads


async def _under(log: HistoryReader, before: LogState, head: Head, positions: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The paths of facts under one head, for which all facts since the head before are read."""
    leaves: list[bytes] = []
    index: dict[int, int] = {}
    at = before.position
    while at < head.state.position and (page := await log.read_all(at, min(PAGE, head.state.position - at))):
        for stored in page:
            if stored.position <= head.state.position:
                index[stored.position] = before.tree.size + len(leaves)
                leaves.append(leaf_hash(stored.position, told_hash(stored)))
        at = page[-1].position
    if before.tree.with_leaves(leaves) != head.state.tree:
        raise CannotAudit(f"The log is not what head {head.number} was signed over. `lookup audit verify` says more.", 1)
    paths = Paths(before.tree, leaves)
    return {
        position: {
            "head": head.number,
            "leaf_index": index[position],
            "path": [node.hex() for node in paths.of(index[position])],
        }
        for position in positions
    }


def _fact(stored: StoredFact, proof: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "position": stored.position,
        "version": stored.stream_version,
        "topic": stored.topic,
        "state": stored.state.decode(),
        "proof": proof,
    }


def _documents(references: Sequence[ResultReference], found: Mapping[str, bytes]) -> dict[str, str]:
    """The documents that are there, by their SHA-256."""
    return {
        reference.sha256: base64.b64encode(found[reference.location.key]).decode()
        for reference in references
        if reference.location.key in found
    }
