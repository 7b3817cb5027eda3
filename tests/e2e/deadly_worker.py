"""A worker for Ping, as real as any, except that one target kills it: `python -m tests.e2e.deadly_worker TARGET`."""

import asyncio
import os
import signal
import sys

from app.parts import Process, parse_parts
from app.settings import Settings
from app.wiring import Wiring
from events.facts import Service, Target
from workers.lookup import Answer, Result


class Echo(Result):
    text: str


async def main(deadly: str) -> None:
    async def look_up(target: Target) -> Answer[Echo]:
        if target.canonical == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return Answer(Echo(text=target.canonical))

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    wiring = Wiring(Settings(), lookups={Service.PING: look_up})
    await Process(wiring, parse_parts(["worker", "Ping"]), "127.0.0.1", 0).run(stop)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
