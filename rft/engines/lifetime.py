"""Whether a server is still the process that was given its weights: one that was restarted has its first ones again.

A server says in /metrics when its process began; one with several API processes does not, but its counters only fall
when it starts anew; one that says neither is believed until a connection to it breaks. Between two signs of life less
than `_RESTART_S` apart nothing can have been restarted, so that only after a pause, or a connection that broke, a reply
must be followed by a look.
"""

from __future__ import annotations

import re
import time

from rft.engines import EngineLoad

_RESTART_S = 5.0  # a vLLM server takes longer than this from its end to its first reply
_STARTED, _SEEN = "process_start_time_seconds", "vllm:prompt_tokens_total"
_RUNNING, _WAITING, _CACHE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
_GAUGES = re.compile(rf"^({_STARTED}|{_SEEN}|{_RUNNING}|{_WAITING}|{_CACHE})(?:\{{.*\}})? (\S+)", re.MULTILINE)


class Lifetime:
    """Of the server behind one engine."""

    def __init__(self) -> None:
        self.is_doubtful = False  # it was silent for so long that it may have been restarted
        self._has_broken = False  # since it was last looked at, or given its weights
        self._heard = 0.0
        self._known: dict[str, float] = {}

    def ask(self) -> None:
        """A request is being sent."""
        self.is_doubtful = self.is_doubtful or time.monotonic() - self._heard > _RESTART_S

    def miss(self) -> None:
        """A connection broke, or there was none."""
        self.is_doubtful = self._has_broken = True

    def trust(self) -> None:
        """It has just been given its weights, whichever process it is."""
        self._has_broken = False

    def hear(self) -> None:
        """A request was answered."""
        if not self.is_doubtful:
            self._heard = time.monotonic()

    def look(self, values: dict[str, float]) -> bool:
        """Whether what `read_gauges` found is, as far as can be told, of the process that it was of the last time."""
        has_broken, self._has_broken = self._has_broken, False
        self._heard, self.is_doubtful = time.monotonic(), False
        if _STARTED not in values and _SEEN not in values:
            return not has_broken
        before, self._known = self._known, values
        if not before:
            return not has_broken
        if _STARTED in before and _STARTED in values:
            return before[_STARTED] == values[_STARTED]
        return values.get(_SEEN, 0.0) >= before.get(_SEEN, 0.0)


def read_gauges(text: str) -> dict[str, float]:
    """Of Prometheus text what rft looks at, summed over labels."""
    values: dict[str, float] = {}
    for name, value in _GAUGES.findall(text):
        values[name] = values.get(name, 0.0) + float(value)
    return values


def read_load(values: dict[str, float], num_asked: int) -> EngineLoad:
    """What the server does. num_asked: requests that we wait for, which may not all have reached it."""
    num_running = int(values.get(_RUNNING, 0))
    num_waiting = max(int(values.get(_WAITING, 0)), num_asked - num_running)
    return EngineLoad(num_running, num_waiting, values.get(_CACHE, 0.0))
