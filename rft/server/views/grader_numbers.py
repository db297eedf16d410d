"""The numbers of each grader of a job, per step: the whole, and for a multi grader each of its parts.

Names and types come from the job's own grader; the numbers from the rows of rft/metrics.py and rft/breakdown.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rft.server.views.steps import Row, Step, number, share

TRAIN, VALID = "train", "valid"  # prefixes of the wire's keys
_COMMON = ("other_error", "sample_parse_error", "invalid_variable_error")
_OF_MODELS = (
    "model_grader_server_error",
    "model_grader_refusal_error",
    "model_grader_parse_error",
    "model_grader_exceeded_max_tokens_error",
)
_FLAGS: dict[str, tuple[str, ...]] = {
    "python": ("python_grader_server_error", "python_grader_runtime_error"),
    "score_model": _OF_MODELS,
    "label_model": _OF_MODELS,
    "endpoint": ("endpoint_grader_server_error", "endpoint_grader_internal_error"),
    "multi": ("formula_parse_error",),
}


@dataclass(frozen=True, slots=True)
class GraderView:
    """One grader as a step sees it. `part` is its key in a multi grader, None for the job's grader itself."""

    name: str
    type: str
    model: str | None
    part: str | None = None

    @property
    def head(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.type}

    @property
    def flags(self) -> tuple[str, ...]:
        """The errors that are always told; every grader can meet the first three."""
        return (*_COMMON, *_FLAGS.get(self.type, ()))

    def reward(self, row: Row, prefix: str) -> float | None:
        return number(row, prefix + ("grade" if self.part is None else f"part/{self.part}"))

    def errors(self, row: Row, prefix: str) -> dict[str, float]:
        """Counts by flag; of a multi grader its parts' errors too."""
        start = prefix + ("grader_error/" if self.part is None else f"part_error/{self.part}/")
        found = {key[len(start) :]: number(row, key) or 0.0 for key in row if key.startswith(start)}
        return {flag: found.get(flag, 0.0) for flag in dict.fromkeys((*self.flags, *found))}

    def num(self, row: Row, prefix: str) -> float | None:
        return number(row, prefix + ("num_graded" if self.part is None else f"part_num/{self.part}"))

    def latency_s(self, row: Row, prefix: str) -> float | None:
        return number(row, prefix + ("grader/latency_s" if self.part is None else f"part_latency_s/{self.part}"))

    def tokens(self, row: Row, prefix: str, kind: str) -> float | None:
        """kind: prompt, completion."""
        name = f"{kind}_tokens"
        return number(row, prefix + (f"grader/{name}" if self.part is None else f"part_{name}/{self.part}"))


def graders_of(job: Mapping[str, Any]) -> list[GraderView]:
    """The job's grader, then the parts of a multi grader; [] for a job without one."""
    method = job.get("method") or {}
    spec = (method.get("reinforcement") or {}).get("grader")
    if not isinstance(spec, Mapping):
        return []
    whole = _view(spec, str(spec.get("type", "grader")), None)
    parts = spec.get("graders")
    if whole.type != "multi" or not isinstance(parts, Mapping):
        return [whole]
    views = [whole]
    for key, part in parts.items():
        view = _view(part, key, key)
        is_taken = (view.type, view.name) in {(other.type, other.name) for other in views}
        views.append(replace(view, name=f"{view.name}-{key}") if is_taken else view)
    return views


def _view(spec: Mapping[str, Any], fallback: str, part: str | None) -> GraderView:
    kind, model = str(spec.get("type", "")), spec.get("model")
    is_judge = kind in ("score_model", "label_model", "model")
    return GraderView(str(spec.get("name") or fallback), kind, str(model) if is_judge else None, part)


def reward_entry(grader: GraderView, step: Step) -> dict[str, Any]:
    return {
        **grader.head,
        "train_reward_mean": grader.reward(step.training, "train/"),
        "valid_reward_mean": grader.reward(step.evaluation, ""),
    }


def error_entry(grader: GraderView, step: Step) -> dict[str, Any]:
    """`train_<flag>_mean`, `_count` and the same for `valid_`; null without an evaluation."""
    entry: dict[str, Any] = dict(grader.head)
    flags = dict.fromkeys((*grader.errors(step.training, "train/"), *grader.errors(step.evaluation, "")))
    for flag in flags:
        for side, row, prefix in sides(step):
            count, num = grader.errors(row, prefix).get(flag, 0.0), grader.num(row, prefix)
            entry[f"{side}_{flag}_mean"] = (count / num if num else 0.0) if row else None
            entry[f"{side}_{flag}_count"] = count if row else None
    return entry


def usage_entry(grader: GraderView, step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {**grader.head, "model": grader.model}
    for kind in ("prompt", "completion"):
        for side, row, prefix in sides(step):
            count, num = grader.tokens(row, prefix, kind), grader.num(row, prefix)
            entry[f"{side}_{kind}_tokens_mean"] = (count or 0.0) / num if num else (0.0 if row else None)
            entry[f"{side}_{kind}_tokens_count"] = (count or 0.0) if row else None
    return entry


def latency_entry(grader: GraderView, step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = dict(grader.head)
    for side, row, prefix in sides(step):
        entry[f"{side}_execution_latency_mean"] = grader.latency_s(row, prefix)
    return entry


def sides(step: Step) -> tuple[tuple[str, Row, str], tuple[str, Row, str]]:
    """(the wire's prefix, the row, the row's prefix) of training and of validation."""
    return (TRAIN, step.training, "train/"), (VALID, step.evaluation, "")


def parse_error_share(step: Step) -> float | None:
    """The share of graded validation rollouts whose answer could not be parsed."""
    share_of = share(step.evaluation, "grader_error/sample_parse_error", "num_graded")
    return share_of if share_of is not None else (0.0 if step.evaluation else None)
