"""`make chaos`: the crash test in its long form, on both transports. Prints what it does, and figures at the end."""

import argparse
import asyncio
import secrets
import shutil
import tempfile
from pathlib import Path

from tests.chaos.plan import LAYOUTS, Plan
from tests.chaos.run import Chaos

SERVERS = {"rabbitmq": ("postgres", "valkey", "rabbitmq"), "redis": ("postgres", "valkey")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--jobs", type=int, default=2_500, help="accepted jobs, at least")
    parser.add_argument("--kills", type=int, default=20, help="of each process")
    parser.add_argument("--server-kills", type=int, default=5, help="of each server")
    parser.add_argument("--freezes", type=int, default=5, help="of each process that is frozen (relay and projector)")
    parser.add_argument("--pace", type=float, default=0.15, help="seconds between two submissions")
    parser.add_argument("--transport", choices=[*SERVERS, "both"], default="both")
    parser.add_argument("--layout", choices=LAYOUTS, default="alone", help="each part alone, or as neighbours in few processes")
    given = parser.parse_args()
    layout = LAYOUTS[given.layout]
    for transport in SERVERS if given.transport == "both" else (given.transport,):
        servers = SERVERS[transport]
        plan = Plan(given.seed, given.jobs, given.kills, given.server_kills, given.freezes, servers, layout=layout)
        print(f"Seed {plan.seed} on {transport}, {given.layout}: {len(plan.steps())} blows", flush=True)
        folder = Path(tempfile.mkdtemp(prefix="lookup-chaos-"))
        report = asyncio.run(Chaos(plan, folder, lambda line: print(line, flush=True)).run(given.pace))
        shutil.rmtree(folder)  # Kept when something broke: the logs are in it.
        print(report, flush=True)


main()
