"""A folder of runs as the page sees it: whoever reaches the page sees all of them, and may pause what runs."""

from __future__ import annotations

import re
from pathlib import Path

from rft.errors import RftError, UserError
from rft.show import status
from rft.store import RunStore
from rft.ui.errors import Missing
from rft.ui.runs import Known
from rft.ui.schema import Action

_RUN_ID = re.compile(r"[^/\\\0]{1,255}")
_ACTIVE = ("starting", "running")


class FolderRuns:
    """The runs in a folder, or the one run that the folder is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> list[Known]:
        """Newest first, by when their config.json was written."""
        found: list[tuple[float, str, Path]] = []
        for config in [self._path / "config.json", *self._path.glob("*/config.json")]:
            try:
                found.append((config.stat().st_mtime, self._id(config.parent), config.parent))
            except OSError:  # not there, or deleted meanwhile
                continue
        return [Known(run_id, RunStore(path)) for _, run_id, path in sorted(found, reverse=True)]

    def get(self, run_id: str) -> Known:
        """Raises Missing."""
        path = self._path if run_id == self._id(self._path) else self._path / run_id
        is_name = _RUN_ID.fullmatch(run_id) is not None and run_id not in (".", "..")
        if not is_name or not (path / "config.json").is_file():
            raise Missing("there is no such run", where=run_id[:80], cure="choose one of the list")
        return Known(run_id, RunStore(path))

    def actions(self, known: Known) -> list[Action]:
        """A run that somebody writes can be paused, once."""
        store = known.store
        try:
            is_live = store is not None and status(store) in _ACTIVE and store.is_written
        except RftError:  # its state cannot be read
            return []
        return ["pause"] if is_live and store is not None and not store.is_pause_asked else []

    def act(self, known: Known, action: Action) -> None:
        """Raises UserError for what `actions` does not offer."""
        if known.store is None or action not in self.actions(known):
            cure = "`rft train CONFIG --resume` continues a run; ending its process cancels it"
            raise UserError(f"{action} is not possible for this run now", where=known.id, cure=cure)
        known.store.ask_to_pause()

    def _id(self, path: Path) -> str:
        return path.resolve().name if path == self._path else path.name
