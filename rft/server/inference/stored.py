"""Responses that were kept (`store`, which is the default): by project, with their own input, for a number of days."""

from __future__ import annotations

import time
from typing import Any

from rft.server.errors import ApiError
from rft.server.index import Index, Page

_KIND = "response"
_DAY_S = 86_400
_NUM_SWEPT = 16  # expired ones that each new one removes
_MAX_CHAIN = 1000


class StoredResponses:
    """Those of a data folder."""

    def __init__(self, index: Index, keep_days: int) -> None:
        self._index, self._keep_s = index, keep_days * _DAY_S

    def add(self, response: dict[str, Any], items: list[dict[str, Any]], project: str) -> None:
        """Keep a response and the items it answered; what is too old goes."""
        oldest = self._index.page(_KIND, limit=_NUM_SWEPT, order="asc").data
        with self._index.transaction():
            for entry in oldest:
                if self._has_expired(entry):
                    self._index.delete(_KIND, entry["id"])
            self._index.put(_KIND, {"id": response["id"], "response": response, "items": items}, project=project)

    def get(self, response_id: str, project: str) -> dict[str, Any]:
        """The wire's object. Raises ApiError (404)."""
        found: dict[str, Any] = self._entry(response_id, project)["response"]
        return found

    def delete(self, response_id: str, project: str) -> None:
        """Raises ApiError (404)."""
        self._entry(response_id, project)
        self._index.delete(_KIND, response_id)

    def input_items(self, response_id: str, project: str, *, limit: int, after: str | None, order: str) -> Page:
        """What it answered, without the responses before. Raises ApiError (404)."""
        items = self._entry(response_id, project)["items"]
        items = items if order == "asc" else items[::-1]
        ids = [item["id"] for item in items]
        start = ids.index(after) + 1 if after in ids else 0
        return Page(items[start : start + limit], len(items) > start + limit)

    def history(self, response_id: str | None, project: str) -> list[dict[str, Any]]:
        """All that was said up to and in a response, oldest first. Raises ApiError (400) where a part is gone."""
        turns: list[list[dict[str, Any]]] = []
        while response_id is not None and len(turns) < _MAX_CHAIN:
            entry = self._find(response_id, project)
            if entry is None:
                message = f"Previous response with id '{response_id}' not found."
                raise ApiError(message, code="previous_response_not_found", param="previous_response_id")
            turns.append([*entry["items"], *entry["response"]["output"]])
            response_id = entry["response"]["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    def _entry(self, response_id: str, project: str) -> dict[str, Any]:
        entry = self._find(response_id, project)
        if entry is None:
            message = f"Response with id '{response_id}' not found."
            raise ApiError(message, status=404, code="response_not_found", param="response_id")
        return entry

    def _find(self, response_id: str, project: str) -> dict[str, Any] | None:
        entry = self._index.get(_KIND, response_id, project=project)
        return None if entry is None or self._has_expired(entry) else entry

    def _has_expired(self, entry: dict[str, Any]) -> bool:
        created_at: int = entry["response"]["created_at"]
        return created_at + self._keep_s < time.time()
