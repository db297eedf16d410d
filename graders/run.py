"""`validate` and `run` of the hosted contract's alpha graders API: one grader, one item, one answer."""

from __future__ import annotations

import json
import secrets
import string
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rft.errors import ConfigError, GraderError
from rft.graders import GraderSpec, GraderTools, build_grader
from rft.graders.base import spec_path
from rft.graders.label_model import LabelModelSpec
from rft.graders.sample import sample_of_text
from rft.types import Grade, Item

# flag -> the name of the field that holds its details, where the contract has one
ERROR_FLAGS: dict[str, str | None] = {
    "formula_parse_error": None,
    "sample_parse_error": "sample_parse_error_details",
    "truncated_observation_error": None,
    "unresponsive_reward_error": None,
    "invalid_variable_error": "invalid_variable_error_details",
    "other_error": None,
    "python_grader_server_error": "python_grader_server_error_type",
    "python_grader_runtime_error": "python_grader_runtime_error_details",
    "model_grader_server_error": "model_grader_server_error_details",
    "model_grader_refusal_error": "model_grader_refusal_error_details",
    "model_grader_parse_error": "model_grader_parse_error_details",
    "model_grader_exceeded_max_tokens_error": None,
    "endpoint_grader_internal_error": "endpoint_grader_internal_error_details",
    "endpoint_grader_server_error": "endpoint_grader_server_error_details",
    "endpoint_grader_safety_check_error": None,
}


def validate(tree: Any, where: str = "grader") -> Any:
    """A grader given as JSON as its spec, named `grader-<12 characters>` when it has no name.

    Raises ConfigError naming the path of the first thing that is wrong, e.g. `grader.graders.a.operation`.
    """
    if isinstance(tree, dict) and tree.get("type") == "label_model":
        return _named(_parse(LabelModelSpec, tree, where))
    return _named(_parse(GraderSpec, tree, where))


def _parse(kind: Any, tree: Any, where: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        path = ".".join([where, *spec_path(("grader", *problem["loc"]))[1:]])
        cure = "compare it with the types in rft/graders"
        raise ConfigError(message.removeprefix("Value error, "), where=path, cure=cure) from None


def _named(spec: Any) -> Any:
    alphabet = string.ascii_letters + string.digits
    name = spec.name or "grader-" + "".join(secrets.choice(alphabet) for _ in range(12))
    return spec.model_copy(update={"name": name})


async def run(
    spec: Any, row: dict[str, Any], answer: str, tools: GraderTools | None = None, trace_id: str = ""
) -> dict[str, Any]:
    """Grade one answer and return the contract's response body. A grader that fails is a response with its flag set."""
    grader = build_grader(spec, tools)
    try:
        await grader.start()
        grade = await grader.grade(Item(id="item", row=row, messages=[]), sample_of_text(answer), trace_id)
    except GraderError as error:
        grade = Grade(score=0.0, errors={error.flag: str(error)})
    finally:
        await grader.close()
    return response(spec, grade)


def response(spec: Any, grade: Grade) -> dict[str, Any]:
    """The body of `graders/run`: reward, metadata with every error flag, sub-rewards and tokens per judge model."""
    usage = {model: used.model_dump() for model, used in grade.all_usage.items()}
    models = sorted(usage)
    return {
        "reward": grade.score,
        "metadata": {
            "name": spec.name,
            "type": spec.type,
            "errors": error_fields(grade),
            "execution_time": grade.latency_s,
            "scores": grade.sub_scores,
            "token_usage": sum(used["prompt_tokens"] + used["completion_tokens"] for used in usage.values()) or None,
            "sampled_model_name": models[0] if len(models) == 1 else None,
        },
        "sub_rewards": grade.sub_scores,
        "model_grader_token_usage_per_model": usage,
    }


def error_fields(grade: Grade) -> dict[str, Any]:
    """Every flag of the contract as a boolean, and its details where the contract has a field for them."""
    found = dict(reversed(grade.all_errors))  # the first of a kind is kept
    fields: dict[str, Any] = {}
    for flag, details in ERROR_FLAGS.items():
        fields[flag] = flag in found
        if details is not None:
            fields[details] = found.get(flag)
    return fields


def load_grader(text: str, where: str) -> Any:
    """A grader from JSON text. Raises ConfigError naming the line or the path."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", where=where, cure="correct the file") from None
    return validate(tree, where)
