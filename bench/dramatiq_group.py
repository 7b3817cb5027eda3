"""dramatiq's contender: a group of four messages that do nothing, with results, and a callback when all four are done.

Verbs of `python -m bench.dramatiq_group`: `serve` is a worker process, `load` the client.
"""

import json
import signal
import sys
from typing import Any

import dramatiq
from dramatiq.broker import Broker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as RedisBarriers
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend as RedisResults
from dramatiq.worker import Worker
from redis import Redis

from bench.children import BenchFailed, tell
from bench.load import Load, measure


def make_broker(corner: dict[str, Any]) -> Broker:
    """The defaults (persistent messages, acknowledged when done, retries) with results and group callbacks."""
    client = Redis.from_url(corner["redis_url"])
    url = corner["rabbitmq_url"]
    broker: Broker = RabbitmqBroker(url=url) if url else RedisBroker(url=corner["redis_url"])  # type: ignore[no-untyped-call]
    broker.add_middleware(GroupCallbacks(RedisBarriers(client=client)))
    broker.add_middleware(Results(backend=RedisResults(client=client)))  # type: ignore[no-untyped-call]
    dramatiq.set_broker(broker)
    return broker


def make_actors() -> tuple[dramatiq.Actor[[int], bool], dramatiq.Actor[[], int]]:
    @dramatiq.actor(store_results=True)
    def nothing(_: int) -> bool:
        return True

    @dramatiq.actor(store_results=True)
    def gathered() -> int:
        return 4

    return nothing, gathered


def serve(options: dict[str, Any]) -> None:
    """What one process of `dramatiq --processes 2` does, until SIGTERM."""
    broker = make_broker(options["corner"])
    make_actors()
    broker.emit_after("process_boot")
    stop_signals = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    worker = Worker(broker, worker_threads=options["threads"])
    worker.start()
    tell("ready")
    signal.sigwait(stop_signals)
    worker.stop()
    broker.close()


def load(options: dict[str, Any]) -> None:
    make_broker(options["corner"])
    load = Load(**options["load"])
    nothing, gathered = make_actors()

    def submit() -> Any:
        callback = gathered.message()
        group = dramatiq.group([nothing.message(number) for number in range(4)])  # type: ignore[no-untyped-call]
        group.add_completion_callback(callback)  # type: ignore[no-untyped-call]
        group.run()  # type: ignore[no-untyped-call]
        return callback

    def finish(callback: Any) -> None:
        if callback.get_result(block=True, timeout=int(load.job_timeout_s * 1000)) != 4:
            raise BenchFailed("A group's callback brought something else.")

    tell(measure(load, submit, finish).as_json())


if __name__ == "__main__":
    {"serve": serve, "load": load}[sys.argv[1]](json.loads(sys.argv[3]))
