"""Celery's contender: a chord of four tasks that do nothing, and a callback that gathers their results.

Verbs of `python -m bench.celery_chord`: `serve` is a worker, `load` the client.
"""

import json
import sys
from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery import Celery, chord  # type: ignore[import-untyped]
from celery.signals import worker_ready  # type: ignore[import-untyped]

from bench.children import BenchFailed, tell
from bench.load import Load, measure

PROCESSES = 2
PREFETCH = 64


def make_app(corner: dict[str, Any]) -> Celery:
    """Celery's defaults (persistent messages, acknowledged early, JSON), less what costs time and is not needed here."""
    redis_url = _socket_url(corner["redis_url"])
    app = Celery("bench", broker=corner["rabbitmq_url"] or redis_url, backend=redis_url)
    app.conf.update(
        worker_prefetch_multiplier=PREFETCH,
        worker_disable_rate_limits=True,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=False,
        result_expires=3600,
    )
    app.task(nothing, name="nothing", ignore_result=True)
    app.task(gather, name="gather")
    return app


def nothing(_: int) -> bool:
    return True


def gather(results: list[bool]) -> int:
    return len(results)


def serve(options: dict[str, Any]) -> None:
    worker_ready.connect(lambda **_: tell("ready"), weak=False)
    make_app(options["corner"]).worker_main(
        [
            "worker",
            f"--pool={options['pool']}",
            f"--concurrency={options['concurrency']}",
            f"--hostname={options['name']}@bench",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--loglevel=WARNING",
        ]
    )


def load(options: dict[str, Any]) -> None:
    app = make_app(options["corner"])
    load = Load(**options["load"])
    header = [app.tasks["nothing"].s(number) for number in range(4)]
    callback = app.tasks["gather"].s()

    def submit() -> Any:
        return chord(header)(callback)

    def finish(result: Any) -> None:
        if result.get(timeout=load.job_timeout_s) != 4:
            raise BenchFailed("A chord's callback did not get four results.")

    tell(measure(load, submit, finish).as_json())


def _socket_url(url: str) -> str:
    """`unix:///path?db=1` as kombu spells it."""
    parts = urlsplit(url)
    return f"redis+socket://{parts.path}?virtual_host={parse_qs(parts.query)['db'][0]}"


if __name__ == "__main__":
    {"serve": serve, "load": load}[sys.argv[1]](json.loads(sys.argv[3]))
