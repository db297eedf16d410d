"""A thread that sees what the main thread may be too busy to see: SIGUSR1, and an event loop that does not turn.

The kernel's signal reaches the thread through Python's wakeup descriptor, also while the main thread computes in C,
so nothing is interrupted. The thread calls back and changes nothing.
"""

from __future__ import annotations

import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

_END = b"\0"
_QUIET_S = 60.0  # between two reports of a blocked loop
_NUM_FRAMES = 4
_JOIN_S = 10.0


class Lookout:
    """Runs from `with` to its end. `beat` is when the loop last turned (time.monotonic()), None while no loop runs.

    on_signal: called in the thread on SIGUSR1. on_blocked: called in the thread with the seconds since the last beat
    and where the main thread is, when that is longer than `blocked_s`; at most once a minute.
    """

    def __init__(
        self, on_signal: Callable[[], None], on_blocked: Callable[[float, str], None], blocked_s: float = 5.0
    ) -> None:
        self.beat: float | None = None
        self._on_signal, self._on_blocked, self._blocked_s = on_signal, on_blocked, blocked_s
        self._quiet_until = 0.0
        self._main = threading.main_thread().ident or 0
        self._thread = threading.Thread(target=self._look, name="rft-lookout", daemon=True)

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._hears = threading.current_thread() is threading.main_thread()  # others may not set signal handlers
        if self._hears:
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._old_handler = signal.signal(signal.SIGUSR1, lambda *_: None)  # the byte it leaves is the message
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._hears:
            signal.signal(signal.SIGUSR1, self._old_handler)
            signal.set_wakeup_fd(self._old_fd)
        self._writer.setblocking(True)
        self._writer.sendall(_END)
        self._thread.join(_JOIN_S)
        self._writer.close()
        self._reader.close()

    def _look(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], self._blocked_s / 5)
            received = self._reader.recv(4096) if ready else b""
            if signal.SIGUSR1 in received:
                self._on_signal()
            if _END in received:
                return
            self._check_beat()

    def _check_beat(self) -> None:
        beat, now = self.beat, time.monotonic()
        if beat is not None and now - beat > self._blocked_s and now > self._quiet_until:
            self._quiet_until = now + _QUIET_S
            self._on_blocked(now - beat, _place(sys._current_frames().get(self._main)))


def _place(frame: FrameType | None) -> str:
    """The innermost functions, the innermost first."""
    found: list[str] = []
    while frame is not None and len(found) < _NUM_FRAMES:
        found.append(f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return ", called by ".join(found) or "an unknown place"
