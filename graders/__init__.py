"""Graders: what is said of a finished rollout. One file per type, `build_grader` picks it.

The spec of each type is the hosted contract's JSON, unchanged. A grader that fails raises `GraderError`; it turns
into a score only where the contract says so.
"""

from __future__ import annotations

if __name__ != "rft.graders":
    raise ImportError("this folder is the package rft.graders: `import rft.graders`, not `import graders`")

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rft.graders.base import Grader, Spec
from rft.graders.cache import CachedGrader, GradeCache
from rft.graders.endpoint import EndpointSpec
from rft.graders.environment import EnvironmentSpec
from rft.graders.judge import Judges
from rft.graders.label_model import LabelModelSpec
from rft.graders.multi import MultiSpec
from rft.graders.python import PythonGraderSpec
from rft.graders.reward_function import RewardFunctionSpec
from rft.graders.score_model import ScoreModelSpec
from rft.graders.sketch import from_sketch
from rft.graders.string_check import StringCheckSpec
from rft.graders.text_similarity import TextSimilaritySpec

__all__ = ["Grader", "GraderSpec", "GraderTools", "PartSpec", "build_grader", "judge_models"]

PartSpec = Annotated[
    StringCheckSpec
    | TextSimilaritySpec
    | PythonGraderSpec
    | ScoreModelSpec
    | LabelModelSpec
    | EndpointSpec
    | RewardFunctionSpec
    | EnvironmentSpec,
    Field(discriminator="type"),
    BeforeValidator(from_sketch),
]
MultiSpec.model_rebuild(_types_namespace={"PartSpec": PartSpec})
# label_model is a part only: what it says is right or wrong, and a formula has to weigh it
GraderSpec = Annotated[
    StringCheckSpec
    | TextSimilaritySpec
    | PythonGraderSpec
    | ScoreModelSpec
    | EndpointSpec
    | RewardFunctionSpec
    | EnvironmentSpec
    | MultiSpec,
    Field(discriminator="type"),
    BeforeValidator(from_sketch),
]


@dataclass(frozen=True, slots=True)
class GraderTools:
    """What graders of a run share. Without a cache nothing is remembered."""

    judges: Judges = field(default_factory=Judges)
    cache: GradeCache | None = None


def build_grader(spec: Any, tools: GraderTools | None = None) -> Grader:
    """The grader that `spec.type` names (a GraderSpec or PartSpec), imported when used, remembering where that pays.

    Raises GraderError when it needs a judge that is not configured.
    """
    tools = tools or GraderTools()
    grader = _build(spec, tools)
    if tools.cache is None or not _is_cached(spec):
        return grader
    return CachedGrader(spec, grader, tools.cache)


def judge_models(spec: Any) -> list[str]:
    """The models that a spec asks for judgements."""
    if isinstance(spec, MultiSpec):
        return sorted({model for part in spec.graders.values() for model in judge_models(part)})
    return [spec.model] if isinstance(spec, ScoreModelSpec | LabelModelSpec) else []


def _is_cached(spec: Spec) -> bool:
    """Off where looking up costs more than grading, and for endpoints, which may know more than they are sent."""
    if isinstance(spec, MultiSpec):
        return False  # its parts are
    if spec.cache is not None:
        return spec.cache
    return not isinstance(spec, StringCheckSpec | EnvironmentSpec | EndpointSpec)


def _build(spec: Any, tools: GraderTools) -> Grader:
    match spec:
        case StringCheckSpec():
            from rft.graders.string_check import StringCheckGrader

            return StringCheckGrader(spec)
        case TextSimilaritySpec():
            from rft.graders.text_similarity import TextSimilarityGrader

            return TextSimilarityGrader(spec)
        case PythonGraderSpec():
            from rft.graders.python import PythonGrader

            return PythonGrader(spec)
        case RewardFunctionSpec():
            from rft.graders.reward_function import RewardFunctionGrader

            return RewardFunctionGrader(spec)
        case ScoreModelSpec():
            from rft.graders.score_model import ScoreModelGrader

            return ScoreModelGrader(spec, tools.judges)
        case LabelModelSpec():
            from rft.graders.label_model import LabelModelGrader

            return LabelModelGrader(spec, tools.judges)
        case EndpointSpec():
            from rft.graders.endpoint import EndpointGrader

            return EndpointGrader(spec)
        case EnvironmentSpec():
            from rft.graders.environment import EnvironmentGrader

            return EnvironmentGrader(spec)
        case MultiSpec():
            from rft.graders.multi import MultiGrader

            return MultiGrader(spec, {key: build_grader(part, tools) for key, part in spec.graders.items()})
    raise TypeError(f"{type(spec).__name__} is not a grader spec")
