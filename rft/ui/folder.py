"""A folder of runs, as whoever may read it sees it. Nothing in it is trusted; only a wish to pause is written."""

from __future__ import annotations

import re
from pathlib import Path

from rft.errors import UserError
from rft.show import status
from rft.store import RunStore
from rft.ui.errors import Missing
from rft.ui.runs import Known
from rft.ui.schema import Action

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_COMMANDS = {
    "resume": "`rft train CONFIG --resume --run-id {run}`",
    "cancel": "`rft pause {run}`, or end its process",
}


class FolderRuns:
    """The runs of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[Known]:
        """Newest first."""
        found = [path.parent for path in self._folder.glob("*/config.json")]
        return [Known(path.name, RunStore(path)) for path in sorted(found, key=_made_at, reverse=True)]

    def get(self, run_id: str) -> Known:
        """Raises Missing."""
        path = self._folder / run_id
        if not _RUN_ID.fullmatch(run_id) or not (path / "config.json").is_file():
            raise Missing(f"there is no run {run_id[:128]}", cure="reload the list of runs")
        return Known(run_id, RunStore(path))

    def actions(self, known: Known) -> list[Action]:
        """A run that somebody trains can be asked to pause."""
        store = known.store
        is_live = store is not None and store.writer() is not None and status(store) in ("starting", "running")
        return ["pause"] if is_live else []

    def act(self, known: Known, action: Action) -> None:
        """Raises UserError with the command for what only a terminal can do."""
        if action != "pause":
            cure = f"type {_COMMANDS[action].format(run=known.id)}"
            raise UserError(f"the page cannot {action} a run of a folder", where=known.id, cure=cure)
        if known.store is None or "pause" not in self.actions(known):
            raise UserError("nobody trains this run now", where=known.id, cure="there is nothing to pause")
        known.store.ask_to_pause()


def _made_at(path: Path) -> float:
    try:
        return (path / "config.json").stat().st_mtime
    except OSError:  # it was removed meanwhile
        return 0.0
