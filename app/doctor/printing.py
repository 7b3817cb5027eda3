"""A report for people: what is broken, by check, and what to do about it."""

from rich.console import Console

from app.doctor.checks import CHECKS, TO_DO
from app.doctor.findings import Finding, Report

SHOWN_MAX = 20
"""So many findings of one check are spelled out; `--json` has more."""


def print_report(report: Report, console: Console) -> None:
    """Findings by check, in the order of the table; then what was not examined, what was mended, and the sums."""
    for name in (check.name for check in CHECKS if report.counts[check.name]):
        _say(console, f"{name}: {report.counts[name]:,}")
        for finding in report.findings[name][:SHOWN_MAX]:
            _say(console, f"  {_sentence(finding)}")
        if report.counts[name] > SHOWN_MAX:
            _say(console, f"  and {report.counts[name] - SHOWN_MAX:,} more")
        _say(console, f"  -> {TO_DO[name]}")
    for mended in report.mended:
        _say(console, f"Mended ({mended.check}) {mended.about}: {mended.did}")
    for what, why in report.unexamined.items():
        _say(console, f"Not examined: {what}. {why}")
    _say(console, _sums(report))
    if (last := report.examined.self_check) is not None:
        _say(console, f"The self-check of {last.at} compared {last.compared:,} documents; {last.differing:,} differed.")
    _say(console, _verdict(report))


def _sentence(finding: Finding) -> str:
    where = "" if finding.position is None else f" (position {finding.position})"
    return f"{finding.about}: {finding.problem}{where}"


def _sums(report: Report) -> str:
    examined = report.examined
    counted = ", ".join(
        f"{count:,} {what}"
        for count, what in (
            (examined.facts, "facts"),
            (examined.jobs, "jobs"),
            (examined.results, "results"),
            (examined.views, "views"),
            (examined.keys, "keys"),
        )
    )
    return f"Examined {counted} in {examined.seconds:.1f} s; the log ended at position {examined.log_head}."


def _verdict(report: Report) -> str:
    mended = f" {len(report.mended):,} findings were mended." if report.mended else ""
    if report.broken:
        return f"{report.broken:,} findings are left.{mended}" if report.mended else f"{report.broken:,} findings."
    return ("Nothing else is broken." if report.mended else "Nothing is broken.") + mended


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)
