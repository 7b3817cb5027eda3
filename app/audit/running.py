"""What the commands of `lookup audit` do: read, verify, print; for people, or as JSON for scripts."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from app.audit.auditing import Auditor, CannotAudit
from app.audit.evidence import VERIFIER, evidence_of
from app.audit.keys import KeyProblem
from app.audit.timeline import as_text, timeline_of, tree_of
from app.audit.verification import Verdict
from app.logs import set_up_logs
from app.running import settings_of_running
from app.settings import Settings
from app.wiring import Wiring, utc_now

Told = Callable[[Auditor], Awaitable[int]]


def run(data_dir: Path | None, keys: Path | None, work: Told) -> int:
    """Do a command's work; gives its exit code."""
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)

    async def working() -> int:
        wiring = Wiring(settings_of_running(settings))
        try:
            return await work(Auditor(wiring, keys))
        finally:
            await wiring.aclose()

    try:
        return asyncio.run(working())
    except CannotAudit as cannot:
        print(f"lookup: {cannot}", file=sys.stderr)
        return cannot.code
    except KeyProblem as problem:
        print(f"lookup: {problem}", file=sys.stderr)
        return 2


def verify(data_dir: Path | None, heads: Path | None, keys: Path | None, *, as_json: bool) -> int:
    async def work(auditor: Auditor) -> int:
        err = Console(stderr=True)
        bar = Progress(
            TextColumn("position {task.completed:,.0f} of {task.total:,.0f}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        with bar:
            task = bar.add_task("", total=None)
            verdict = await auditor.verify(heads, lambda position, total: bar.update(task, completed=position, total=total))
        if as_json:
            print(json.dumps(as_document(verdict), indent=2))
        else:
            print_verdict(verdict)
        return 0 if verdict.is_sound else 1

    return run(data_dir, keys, work)


def as_document(verdict: Verdict) -> dict[str, Any]:
    document = asdict(verdict)
    document["head_at"] = verdict.head_at.isoformat() if verdict.head_at else None
    first = verdict.first_bad
    return {"sound": verdict.is_sound, "first_bad": asdict(first) if first else None, **document}


def print_verdict(verdict: Verdict) -> None:
    """A sentence a line; the first bad position comes first."""
    for problem in verdict.head_problems:
        print(f"HEADS  {problem}")
    for defect in verdict.defects:
        where = (
            f"position {defect.position}" if defect.position == defect.last else f"positions {defect.position} to {defect.last}"
        )
        print(f"BAD    {where}: {defect.what}")
    if verdict.broken > len(verdict.defects):
        print(f"       and {verdict.broken - len(verdict.defects)} more.")
    print(f"{verdict.facts} facts and {verdict.documents} result documents were verified, up to position {verdict.log_head}.")
    if verdict.erased:
        print(f"{verdict.erased} result documents are gone with what was erased.")
    if verdict.head_number is None:
        print("No signed head covers any of it: only the chains were verified. See `lookup audit keygen`.")
    else:
        print(f"Positions up to {verdict.covered} are covered by head {verdict.head_number} of {verdict.head_at:%F %T} UTC.")
        print(f"{verdict.beyond} facts after that are covered by no signed head yet.")
    print("The log is what was recorded." if verdict.is_sound else "THE LOG IS NOT WHAT WAS RECORDED.")


def as_job_id(text: str) -> UUID:
    """Raises `CannotAudit`."""
    try:
        return UUID(text)
    except ValueError:
        raise CannotAudit(f"{text!r} is no job id.", 2) from None


def export(data_dir: Path | None, job: str, out: Path | None) -> int:
    async def work(auditor: Auditor) -> int:
        bundle = await evidence_of(auditor, as_job_id(job), utc_now())
        text = json.dumps(bundle, indent=1)
        if out is None:
            print(text)
        else:
            _write(out, text + "\n")
        covered = sum(fact["proof"] is not None for fact in bundle["facts"])
        print(f"{covered} of {len(bundle['facts'])} facts are covered by signed heads. To check it:", file=sys.stderr)
        print(f"python -I -S {VERIFIER} {out or 'BUNDLE'} --key KEY_ID", file=sys.stderr)
        return 0

    return run(data_dir, None, work)


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotAudit(f"{out} cannot be written.", 1) from error


def show(data_dir: Path | None, job: str, *, as_json: bool) -> int:
    async def work(auditor: Auditor) -> int:
        lines = timeline_of(await auditor.stream(as_job_id(job)))
        print(json.dumps([asdict(line) for line in lines], indent=2) if as_json else "\n".join(map(as_text, lines)))
        return 0

    return run(data_dir, None, work)


def tree(data_dir: Path | None, job: str) -> int:
    async def work(auditor: Auditor) -> int:
        print("\n".join(tree_of(timeline_of(await auditor.stream(as_job_id(job))))))
        return 0

    return run(data_dir, None, work)
