"""Our contender: the real parts on the real servers, with lookups that do nothing, asked over HTTP.

Verbs of `python -m bench.product`: `serve` runs some parts, `load` is their client.
"""

import asyncio
import json
import signal
import sys
from typing import Any

import uvloop
from psycopg.conninfo import make_conninfo

from app.logs import set_up_logs
from app.migrate import APP_ROLE
from app.parts import Process, parse_parts
from app.running import run_loop
from app.settings import Settings
from app.wiring import Wiring
from bench import http_load
from bench.children import tell
from bench.load import Load
from bench.sampling import Sampler
from events.facts import Service, Target
from workers.lookup import Answer, Result

LAYOUTS: dict[str, list[list[str]]] = {
    "one process": [["write", "read", "relay", "saga", "projector", "worker"]],
    "two processes": [["write", "relay", "saga", "projector"], ["read", "worker"]],
}
"""The parts of each process. One process is what `lookup up` runs."""


class Nothing(Result):
    """The smallest result there is."""

    answered: bool = True


async def nothing(_: Target) -> Answer[Nothing]:
    return Answer(Nothing())


def serve(options: dict[str, Any]) -> None:
    """Run the parts `options["parts"]` until SIGTERM."""
    corner = options["corner"]
    settings = Settings(
        database_url=make_conninfo(corner["database_owner_url"], user=APP_ROLE),
        redis_url=corner["redis_url"],
        broker_url=corner["rabbitmq_url"],
        host="127.0.0.1",
        port=0,
        log_level="WARNING",
    )
    set_up_logs(settings.log_format, settings.log_level)
    run_loop(_serve(settings, options))


async def _serve(settings: Settings, options: dict[str, Any]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    wiring = Wiring(settings, lookups=dict.fromkeys(Service, nothing))
    with Sampler(options.get("samples")):
        await Process(wiring, parse_parts(options["parts"]), settings.host, settings.port, tell).run(stop)


def load(options: dict[str, Any]) -> None:
    urls = options["urls"]
    tell(uvloop.run(http_load.measure(Load(**options["load"]), urls["write"], urls["read"])).as_json())


if __name__ == "__main__":
    {"serve": serve, "load": load}[sys.argv[1]](json.loads(sys.argv[3]))
