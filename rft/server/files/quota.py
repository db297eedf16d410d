"""What a project may store and how often it may upload. Counts only: what is stored is files.py's."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict, deque

from rft.server.errors import ApiError
from rft.server.settings import LimitsConfig

_MINUTE_S = 60.0


class Quota:
    """Of every project. Bytes may be counted in any thread, uploads in one."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._num_bytes: Counter[str] = Counter()
        self._uploads: dict[str, deque[float]] = defaultdict(deque)

    def count_upload(self, project: str) -> None:
        """One more upload now. Raises ApiError (429) with the seconds to wait."""
        now, recent = time.monotonic(), self._uploads[project]
        while recent and now - recent[0] >= _MINUTE_S:
            recent.popleft()
        if len(recent) >= self._limits.uploads_per_minute:
            wait_s = max(1, math.ceil(recent[0] + _MINUTE_S - now))
            raise ApiError(
                f"Rate limit reached: {self._limits.uploads_per_minute} uploads per minute. Try again in {wait_s} s.",
                status=429,
                code="rate_limit_exceeded",
                headers={"retry-after": str(wait_s)},
            )
        recent.append(now)

    def reserve(self, project: str, num_bytes: int) -> None:
        """Raises ApiError (400) when the project has no room for them."""
        with self._lock:
            if self._num_bytes[project] + num_bytes > self._limits.max_project_bytes:
                most = self._limits.max_project_bytes
                message = f"The files of this project would exceed {most:,} bytes; delete some."
                raise ApiError(message, code="storage_limit_exceeded")
            self._num_bytes[project] += num_bytes

    def add(self, project: str, num_bytes: int) -> None:
        """What is there already, or is ours: never refused. Negative for what is gone."""
        with self._lock:
            self._num_bytes[project] += num_bytes
