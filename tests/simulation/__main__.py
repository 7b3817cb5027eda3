"""`make simulate SEEDS=10000`: many seeds, or one again. Exit code 1 when something broke."""

import argparse
import gc
import sys
import time
from collections import Counter

from tests.simulation.world import Report, simulate

BROKEN_MAX = 3
TOLD_EACH_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one only, with its whole trace")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _once(arguments.seed)
    return _many(range(arguments.first, arguments.first + arguments.seeds))


def _once(seed: int) -> int:
    report = simulate(seed)
    print("\n".join(report.trace))
    print(f"Seed {seed}: {report.broken or 'everything held'} ({report.steps} steps, {report.seconds:.1f} virtual seconds)")
    return int(report.broken is not None)


def _many(seeds: range) -> int:
    gc.collect()
    gc.freeze()
    counts: Counter[str] = Counter()
    steps, seconds, broken, done = 0, 0.0, list[Report](), 0
    started_at = told_at = time.monotonic()
    for done, report in enumerate(map(simulate, seeds), start=1):
        counts.update(report.counts)
        steps, seconds = steps + report.steps, seconds + report.seconds
        if report.broken is not None:
            broken.append(report)
            print(report, end="\n\n", flush=True)
        if len(broken) >= BROKEN_MAX:
            break
        if time.monotonic() - told_at > TOLD_EACH_S:
            told_at = time.monotonic()
            print(f"{done} seeds, {done / (told_at - started_at):.1f} seeds/s", file=sys.stderr, flush=True)
    took_s = time.monotonic() - started_at
    for what, count in sorted(counts.items()):
        print(f"{count:10,}  {what}")
    print(f"{steps:10,}  steps in {seconds:,.0f} virtual seconds")
    print(f"{done} seeds from {seeds.start} on, {len(broken)} broken, {done / took_s:.1f} seeds/s")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
