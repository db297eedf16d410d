"""Who waits for whom: every rollout in flight, what it waits for, and since when.

The registry only knows; what is made of it (a page, a signal, the end of a run that stands still) is watch.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rft.types import StopReason


@dataclass(frozen=True, slots=True, eq=False)
class Wait:
    """One wait: a rollout (its id) for one thing, e.g. `engine`, `tool search`, `grader`, `slot`."""

    rollout_id: str
    item_id: str
    what: str
    since: float  # time.monotonic()


@dataclass(slots=True)
class Waits:
    """The open waits of a run. `last_progress` is when one last ended, in seconds of time.monotonic()."""

    last_progress: float = field(default_factory=time.monotonic)
    num_ended: int = 0
    stops: Counter[StopReason] = field(default_factory=Counter)  # rollouts that ended, by stop reason
    _open: dict[Wait, None] = field(default_factory=dict)  # in the order they began

    @contextmanager
    def on(self, rollout_id: str, item_id: str, what: str) -> Iterator[None]:
        """While it lasts, the rollout waits for `what`."""
        wait = Wait(rollout_id, item_id, what, time.monotonic())
        self._open[wait] = None
        try:
            yield
        finally:
            del self._open[wait]
            self.last_progress = time.monotonic()
            self.num_ended += 1

    def __iter__(self) -> Iterator[Wait]:
        return iter(list(self._open))

    def __len__(self) -> int:
        return len(self._open)

    def counts(self) -> dict[str, int]:
        """How many wait for what, the most first."""
        return dict(Counter(wait.what for wait in self._open).most_common())
