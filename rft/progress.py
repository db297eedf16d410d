"""What a person sees of a run: bars with an ETA for every long phase, and one line per event worth keeping.

On a terminal the bars live at the bottom and lines scroll above them; elsewhere (a pipe, a log) only lines are
written, one when a phase ends. Model output and tool results never come here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Phase:
    """One long piece of work; `advance` moves its bar, `status` changes its text."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def status(self, text: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=escape(text))


class Display:
    """Draws phases and lines; `enabled=False` (every rank but the first) draws nothing.

    to_stderr: where standard output is for a result that a program reads.
    """

    def __init__(self, *, enabled: bool = True, to_stderr: bool = False) -> None:
        self.enabled = enabled
        self._labels: list[str] = []
        self._console = Console(highlight=False, soft_wrap=True, stderr=to_stderr)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    @property
    def has_bars(self) -> bool:
        return self.enabled and self._console.is_terminal

    @property
    def label(self) -> str:
        """Of the phase that was begun last and has not ended; "" between two."""
        return next(iter(self._labels[-1:]), "")

    def __enter__(self) -> Display:
        if self.has_bars:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.has_bars:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Keep one line of plain text."""
        if self.enabled:
            self._console.print(escape(text))

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def show(self, renderable: RenderableType) -> None:
        """Keep a table or another rich object."""
        if self.enabled:
            self._console.print(renderable)

    @contextmanager
    def phase(self, label: str, total: int | None = None, *, keep: bool = True) -> Iterator[Phase]:
        """A bar while the work runs; with `keep`, one line with its duration when it ends."""
        started = time.perf_counter()
        self._labels.append(label)
        task = self._progress.add_task(escape(label), total=total) if self.has_bars else None
        try:
            yield Phase(self._progress if self.has_bars else None, task)
        finally:
            self._labels.remove(label)
            if task is not None:
                self._progress.remove_task(task)
        if keep:
            self.line(f"{label}: {time.perf_counter() - started:.1f} s")
