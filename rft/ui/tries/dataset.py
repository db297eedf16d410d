"""A dataset looked through, in the child: every row as a run would read it, all problems counted, the first shown."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rft.data import Looked, ToolSpecs, look_through, parse_item
from rft.errors import UserError
from rft.types import Item
from rft.ui.lines import cut
from rft.ui.schema import MAX_TEXT, DatasetProblem, DatasetResult, DatasetTry
from rft.ui.tries.relay import Relay

MAX_SHOWN = 100
_MAX_NAMES, _MAX_NAME, _MAX_PROBLEM = 200, 200, 500
_NO_ROWS = DatasetProblem(line=None, field=None, problem="the file has no rows", cure="write one JSON object per line")


async def look_at(request: dict[str, Any], relay: Relay) -> dict[str, Any]:
    """request: `body`, the path of a DatasetTry as it came. A DatasetResult. Raises UserError."""
    return _look_at(Path(request["body"])).model_dump(mode="json")


def _look_at(body: Path) -> DatasetResult:
    try:
        asked = DatasetTry.model_validate_json(body.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(problem["msg"], where=where, cure="send text, and environment or nothing") from None
    rows = body.with_name("rows.jsonl")
    rows.write_text(asked.text, encoding="utf-8", errors="surrogatepass", newline="")
    return _looked_through(rows, _tool_specs(asked.environment))


def _looked_through(path: Path, specs: ToolSpecs | None) -> DatasetResult:
    columns: Counter[str] = Counter()
    tools: set[str] = set()
    problems: list[DatasetProblem] = []
    example: str | None = None
    num_rows = num_problems = 0
    for looked in look_through(path, lambda row, item_id, found: parse_item(row, item_id, specs, found)):
        num_rows += 1
        num_problems += len(looked.found)
        problems += _shown(looked, MAX_SHOWN - len(problems))
        _count(columns, looked.row or {})
        if looked.value is not None:
            tools.update(looked.value.tool_names)
            example = example or _messages(looked.value)
    if not num_rows:
        problems, num_problems = [_NO_ROWS], 1
    return DatasetResult(
        num_rows=num_rows,
        num_problems=num_problems,
        problems=problems,
        columns=dict(columns.most_common(_MAX_NAMES)),
        tools=sorted(cut(name, _MAX_NAME) for name in tools)[:_MAX_NAMES],
        example=example,
    )


def _shown(looked: Looked[Item], num: int) -> list[DatasetProblem]:
    return [
        DatasetProblem(line=line, field=cut(field, _MAX_NAME), problem=cut(problem, _MAX_PROBLEM), cure=cure)
        for line, field, problem, cure in looked.found[: max(0, num)]
    ]


def _count(columns: Counter[str], row: dict[str, Any]) -> None:
    """Rows whose keys are data would fill the table: what comes after the first thousand names is not counted."""
    names = [cut(key, _MAX_NAME) for key in row]
    columns.update(name for name in names if name in columns or len(columns) < 5 * _MAX_NAMES)


def _messages(item: Item) -> str:
    return cut(json.dumps([message.as_chat() for message in item.messages], ensure_ascii=False, indent=2), MAX_TEXT)


def _tool_specs(environment: dict[str, Any] | None) -> ToolSpecs | None:
    """The tools that an http environment lists; None where rows may name any. Nothing is imported, started or called.

    Raises UserError for an environment that would have to be started to be asked.
    """
    if environment is None:
        return None
    tools = environment.get("tools")
    if environment.get("type", "http") != "http" or not isinstance(tools, list | None):
        cure = "leave out environment, or give its tools as an http environment does"
        problem = "only the tools of an http environment are known without starting it"
        raise UserError(problem, where="environment", cure=cure)
    if not tools:
        return None  # those of the task that the run serves
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools):
        raise UserError("every tool needs a name", where="environment.tools", cure='write {"name": ..., ...}')
    return {tool["name"]: tool.get("function") for tool in tools}
