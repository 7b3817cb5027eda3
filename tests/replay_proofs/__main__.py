"""`python -m tests.replay_proofs kills | clients`: the long form of both proofs. Prints figures."""

import argparse
import asyncio
import shutil
import tempfile
from pathlib import Path

from tests.replay_proofs import clients, kills


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.replay_proofs", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    proofs = parser.add_subparsers(dest="proof", required=True)
    killing = proofs.add_parser("kills", help="kill -9 of the projector under load, against a clean rebuild")
    killing.add_argument("--kills", type=int, default=50)
    killing.add_argument("--facts", type=int, default=10_000, help="in the log at the end, at least")
    killing.add_argument("--freezes", type=int, default=3, help="so often one is frozen until another leads, and woken up")
    killing.add_argument("--pace", type=float, default=0.15, help="seconds between two submissions")
    killing.add_argument("--at-once", action="store_true", help="do not wait 5 s each time for the lease of the dead one")
    polling = proofs.add_parser("clients", help="clients that poll while `lookup replay` runs")
    polling.add_argument("--clients", type=int, default=1_000)
    polling.add_argument("--history", type=int, default=30_000, help="facts in the log before anybody comes")
    polling.add_argument("--pause", type=float, default=3.0, help="seconds between two polls of a client")
    polling.add_argument("--rate", type=float, help="facts a second that a replay folds at most")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lookup-proof-"))
    if given.proof == "kills":
        plan = kills.Plan(given.kills, given.facts, given.freezes, given.pace, given.seed, not given.at_once)
        asyncio.run(kills.Kills(plan, folder, _say).run())
    else:
        polled = clients.Plan(given.clients, given.history, given.pause, rate=given.rate, seed=given.seed)
        asyncio.run(clients.Polled(polled, folder, _say).run())
    shutil.rmtree(folder)  # Kept when something broke: the logs are in it.


def _say(line: str) -> None:
    print(line, flush=True)


main()
