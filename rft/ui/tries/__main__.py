"""`python -m rft.ui.tries STORY`, started by process.py alone: reads a request, asks judges, writes an answer."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from rft.errors import RftError, UserError
from rft.ui.lines import cut
from rft.ui.tries import dataset, grading
from rft.ui.tries.relay import MAX_LINE_BYTES, Relay

MEMORY_BYTES = 2 * 2**30  # of addresses; what a sandbox may have as well
STORIES: dict[str, Callable[[dict[str, Any], Relay], Awaitable[dict[str, Any]]]] = {
    "grade": grading.grade_again,
    "dataset": dataset.look_at,
}


async def _run(story: str, stdout: int) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    request = json.loads(await reader.readuntil(b"\n"))
    relay = Relay(reader, stdout)
    listening = asyncio.create_task(relay.listen())
    try:
        answer = await STORIES[story](request, relay)
    except UserError as error:
        text = cut(error.problem) + (f" ({error.cure})" if error.cure else "")
        answer = {"problem": text, "field": cut(error.where)}
    except RftError as error:
        answer = {"problem": cut(str(error)), "field": None}
    except MemoryError:
        answer = {"problem": f"it needs more than {MEMORY_BYTES // 2**30} GiB of memory", "field": None}
    finally:
        listening.cancel()
    relay.say({"answer": answer})


def main(story: str) -> None:
    """Prints of whatever runs here go to standard error: standard output is the pipe to the server."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    asyncio.run(_run(story, stdout))


if __name__ == "__main__":
    main(sys.argv[1])
