"""A rollout as an output item of an eval run: what was asked, what came back, every grader's result, the trace."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.data import Problems, load_rows
from rft.server.evals.traces import trace_of
from rft.types import Rollout

_ITEM, _TRACE = "outputitem_", "trace_"
_MAX_FILES = 4


@dataclass(frozen=True, slots=True)
class Graded:
    """What an item is part of, and what its graders said. `model` is the one that was evaluated."""

    eval_id: str
    run_id: str
    status: str
    results: list[dict[str, Any]]
    model: str


class RowCache:
    """The rows of the data files that were read last, by the ids of their items. Thread-safe."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Path, int, int], dict[str, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, path: Path) -> dict[str, dict[str, Any]]:
        """Raises DataError for a file that is gone or broken."""
        try:
            status = path.stat()
            key = (path, status.st_mtime_ns, status.st_size)
        except OSError:
            key = (path, 0, 0)  # reading it says what is wrong
        with self._lock:
            if key not in self._files:
                self._files[key] = dict(load_rows(path, _with_id))
                while len(self._files) > _MAX_FILES:
                    self._files.popitem(last=False)
            return self._files[key]


def _with_id(row: dict[str, Any], item_id: str, problems: Problems) -> tuple[str, dict[str, Any]]:
    return item_id, row


def item_id_of(rollout_id: str) -> str:
    return _ITEM + rollout_id.removeprefix(_TRACE)


def rollout_id_of(item_id: str) -> str:
    return _TRACE + item_id.removeprefix(_ITEM)


def output_item(rollout: Rollout, row: Mapping[str, Any], graded: Graded) -> dict[str, Any]:
    """row: the dataset row; {} where its file is gone."""
    messages = row.get("messages") or []
    parallel = row.get("parallel_tool_calls")
    return {
        "object": "eval.run.output_item",
        "id": item_id_of(rollout.id),
        "created_at": int(rollout.started_at + rollout.duration_s),
        "eval_id": graded.eval_id,
        "run_id": graded.run_id,
        "status": graded.status,
        "datasource_item_id": _row_number(rollout.item_id),
        "datasource_item": {
            **row,
            "parallel_tool_calls": True if parallel is None else parallel,
            "trace": trace_of(rollout, messages),
        },
        "results": graded.results,
        "sample": _sample(rollout, messages, graded.model),
    }


def _row_number(item_id: str) -> int:
    digits = item_id.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def _sample(rollout: Rollout, messages: list[Any], model: str) -> dict[str, Any]:
    """`output` is the final message with the calls of the whole rollout, as graders see them."""
    last = rollout.turns[-1] if rollout.turns else None
    calls = [call.as_chat() for call, _ in rollout.tool_calls]
    prompt = rollout.num_prompt_tokens
    errors = dict(rollout.grade.all_errors) if rollout.grade is not None else {}
    return {
        "input": [
            {"role": message.get("role"), "content": message.get("content")}
            for message in messages
            if isinstance(message, dict)
        ],
        "output": [{"role": "assistant", "content": rollout.output_text, "tool_calls": calls}],
        "finish_reason": last.finish_reason if last is not None else "stop",
        "model": model,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": rollout.num_sampled_tokens,
            "total_tokens": prompt + rollout.num_sampled_tokens,
            "cached_tokens": 0,
        },
        "error": _error(rollout, errors),
        "seed": rollout.seed,
        "stop_reason": rollout.stop_reason.value,
    }


def _error(rollout: Rollout, errors: dict[str, str]) -> dict[str, str] | None:
    if rollout.error:
        return {"code": rollout.stop_reason.value, "message": rollout.error}
    return next(({"code": flag, "message": detail} for flag, detail in errors.items()), None)
