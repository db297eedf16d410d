"""One row of an eval run: asked where a model is to answer, graded by every grader, and what came of it.

A failure of the world makes the item an `error`; it never becomes a score.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rft.errors import RftError
from rft.graders import Grader
from rft.server.errors import ApiError
from rft.server.evals.sources import EvalRow, Question, sample_of_completion, sample_of_row
from rft.server.evals.verdicts import count_results, model_usage, threshold_of
from rft.server.ids import new_id
from rft.types import Item, TokenUsage


@dataclass(frozen=True, slots=True)
class Criterion:
    """A grader of an eval, started; `tree` is what the client wrote."""

    grader: Grader
    tree: Mapping[str, Any]
    name: str


@dataclass(slots=True)
class Tally:
    """What the items of a run come to."""

    statuses: list[str] = field(default_factory=list)
    passed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    usage: dict[str, TokenUsage] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add_usage(self, model: str, used: TokenUsage) -> None:
        self.usage[model] = self.usage.get(model, TokenUsage()) + used
        self.calls[model] = self.calls.get(model, 0) + 1

    def add_item(self, item: Mapping[str, Any]) -> None:
        self.statuses.append(item["status"])
        for result in item["results"]:
            counts = self.passed if result["passed"] else self.failed
            counts[result["name"]] = counts.get(result["name"], 0) + 1

    def fields(self, names: list[str]) -> dict[str, Any]:
        """Of the wire's run object; names: of the graders."""
        return {
            "result_counts": count_results(self.statuses),
            "per_testing_criteria_results": [
                {"testing_criteria": name, "passed": self.passed.get(name, 0), "failed": self.failed.get(name, 0)}
                for name in names
            ],
            "per_model_usage": [
                model_usage(model, self.calls[model], used.prompt_tokens, used.completion_tokens, used.cached_tokens)
                for model, used in self.usage.items()
            ],
        }


class Examiner:
    """Makes output items of rows. `ask` sends a chat completion's body to the run's model."""

    def __init__(
        self, run: Mapping[str, Any], criteria: list[Criterion], question: Question | None, ask: Any, tally: Tally
    ) -> None:
        self._run, self._criteria, self._question, self._ask, self._tally = run, criteria, question, ask, tally

    async def item(self, row: EvalRow, number: int) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        sample: dict[str, Any] = {}
        results: list[dict[str, Any]] = []
        error = None
        try:
            if self._question is None:
                sample = sample_of_row(row.sample)
            else:
                body = self._question.body(row.item)
                messages = body["messages"]
                sample = await self._answer(body)
            results = [await self._grade(criterion, row, sample) for criterion in self._criteria]
        except (RftError, ApiError) as failure:
            error = {"code": getattr(failure, "code", None) or "sample_error", "message": str(failure)}
        return {
            "object": "eval.run.output_item",
            "id": new_id("outputitem_", 32),
            "created_at": int(time.time()),
            "eval_id": self._run["eval_id"],
            "run_id": self._run["id"],
            "status": _status(results, error),
            "datasource_item_id": number,
            "datasource_item": row.item,
            "results": results,
            "sample": _sample(sample, messages, error, self._question),
        }

    async def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        completion = await self._ask(body)
        sample = sample_of_completion(completion)
        used = _usage(completion.get("usage"))
        self._tally.add_usage(body["model"], used)
        return sample | {"usage": used.model_dump()}

    async def _grade(self, criterion: Criterion, row: EvalRow, sample: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {"name": criterion.name, "type": criterion.tree.get("type")}
        try:
            grade = await criterion.grader.grade(Item(id="item", row=row.item, messages=[]), sample, "")
        except RftError as failure:
            return result | {"score": 0.0, "passed": False, "error": str(failure), "sample": None}
        for model, used in grade.all_usage.items():
            self._tally.add_usage(model, used)
        told = {"sub_rewards": grade.sub_scores, "errors": dict(grade.all_errors)}
        return result | {
            "score": grade.score,
            "passed": grade.score >= threshold_of(criterion.tree),
            "sample": told if any(told.values()) else None,
        }


def _status(results: list[dict[str, Any]], error: Any) -> str:
    if error is not None or any("error" in result for result in results):
        return "error"
    return "pass" if all(result["passed"] for result in results) else "fail"


def _usage(usage: Any) -> TokenUsage:
    """Zeros where a server tells no numbers."""
    found = usage if isinstance(usage, Mapping) else {}
    prompt, completion = found.get("prompt_tokens"), found.get("completion_tokens")
    return TokenUsage(prompt_tokens=_count(prompt), completion_tokens=_count(completion))


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _sample(
    sample: Mapping[str, Any], messages: list[dict[str, Any]], error: Any, question: Question | None
) -> dict[str, Any]:
    """As the wire has it; a stored sample may say nothing but its text."""
    choices, usage = sample.get("choices"), sample.get("usage")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    used = usage if isinstance(usage, Mapping) else {}
    prompt, completion = _count(used.get("prompt_tokens")), _count(used.get("completion_tokens"))
    content, calls = sample.get("output_text"), sample.get("output_tools") or []
    params = question.params if question is not None else {}
    return {
        "input": [{"role": message.get("role"), "content": message.get("content")} for message in messages],
        "output": [{"role": "assistant", "content": content, "tool_calls": calls}] if sample else [],
        "finish_reason": choice.get("finish_reason") if isinstance(choice, Mapping) else None,
        "model": question.model if question is not None else sample.get("model"),
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "cached_tokens": 0,
        },
        "error": error,
        "seed": params.get("seed"),
        "temperature": params.get("temperature"),
        "top_p": params.get("top_p"),
        "max_completion_tokens": params.get("max_completion_tokens"),
    }
