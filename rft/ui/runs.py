"""Which runs the page shows, and what can be done to them: a folder of runs, or the jobs of a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from fastapi import Request

from rft.store import RunStore
from rft.ui.schema import Action, JobLine


@dataclass(frozen=True, slots=True)
class Known:
    """A run that may be looked at. `store` is None for a job that has not run yet."""

    id: str
    store: RunStore | None
    job: JobLine | None = None


class Runs(Protocol):
    """The runs that one caller may see."""

    def all(self) -> list[Known]:
        """Newest first."""
        ...

    def get(self, run_id: str) -> Known:
        """Raises Missing."""
        ...

    def actions(self, known: Known) -> list[Action]:
        """What `act` would do now."""
        ...

    def act(self, known: Known, action: Action) -> None:
        """Ask for it; it may take the rest of a step. Raises UserError."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """What one application serves: found by the routes as `request.app.state.page`."""

    mode: Literal["folder", "server"]
    needs_key: bool
    runs_of: Callable[[Request], Runs]  # raises what the application answers to a caller without a key
