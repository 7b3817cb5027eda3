"""Ending tasks for certain.

Before Python 3.12, `asyncio.wait_for` loses a cancellation that comes in the moment in which it ends, and redis-py has one
around each command: who cancels once and waits may wait for ever.
"""

import asyncio
from collections.abc import Collection
from typing import Any

AGAIN_S = 2.0
"""An orderly end is not cut short by being told again: it takes less, unless what it waits for does not answer."""


async def end(tasks: Collection["asyncio.Task[Any]"], within_s: float) -> None:
    """Cancel the tasks, again and again, until all have ended; gives up after `within_s`. What they raise is dropped."""
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + within_s
    ending = set(tasks)
    while ending and clock() < give_up_at:
        for task in ending:
            task.cancel()
        ended, ending = await asyncio.wait(ending, timeout=AGAIN_S)
        await asyncio.gather(*ended, return_exceptions=True)
