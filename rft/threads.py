"""Threads that may be left behind: code from outside that never returns must not keep a run from ending.

The threads of asyncio's own pool are joined, without a deadline, when the loop ends and again when the process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

LOADING_A_MODEL = threading.Lock()
"""Held while transformers loads a model: it swaps `PreTrainedModel.tie_weights` meanwhile and puts back what it found,
so that of two loads at once in one process one may leave it swapped, and no model is tied from then on.
"""


class DaemonThreads(ThreadPoolExecutor):
    """For `loop.set_default_executor`: one daemon thread per call, so that one stuck call never delays another.

    Who calls limits how many there are. Ending it waits for nobody.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # everything goes to whoever waits, as in a pool
                future.set_exception(error)

        threading.Thread(target=work, name="rft-call", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing to end: every thread ends with its call."""
