"""Graders that come over the wire: what they may be, and where the models that they ask are.

A client may name no file of this machine and nothing that would load a model into the server: those graders are for
config files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rft.errors import ConfigError
from rft.graders import GraderTools, judge_models
from rft.graders.endpoint import EndpointSpec
from rft.graders.judge import Judge, JudgeConfig, Judges
from rft.graders.multi import MultiSpec
from rft.graders.run import validate
from rft.server.errors import ApiError, of_user_error
from rft.server.grading.local_judge import LocalJudge
from rft.server.settings import RemoteModel

if TYPE_CHECKING:
    from rft.server.services import Services

CODE = "invalid_grader"
_TYPES = ("string_check", "text_similarity", "python", "score_model", "label_model", "endpoint", "multi", "model")


def wire_grader(services: Services, tree: Any, param: str) -> Any:
    """The spec of a grader's JSON, named. Raises ApiError (400) whose `param` is the path of what is wrong."""
    _check_tree(tree, param)
    try:
        spec = validate(tree, param)
    except ConfigError as error:
        raise of_user_error(error, code=CODE) from None
    _check_urls(services, spec, param)
    return spec


def contract_form(tree: dict[str, Any], spec: Any) -> dict[str, Any]:
    """The JSON of a grader as its client wrote it, header values included, with its name; a sketch as what it means."""
    is_sketch = tree.get("type") != spec.type
    form = spec.model_dump(mode="json", exclude_unset=True) | {"type": spec.type} if is_sketch else tree
    return {**form, "name": spec.name}


def _check_tree(tree: Any, param: str) -> None:
    if not isinstance(tree, dict):
        message = f"Invalid type for '{param}': expected an object, but got {_kind(tree)} instead."
        raise ApiError(message, code=CODE, param=param)
    if tree.get("type") not in _TYPES:
        message = f"Invalid value for '{param}.type': supported values are {', '.join(_TYPES[:-1])}."
        raise ApiError(message, code=CODE, param=f"{param}.type")
    if tree.get("evaluation_metric") == "cosine" or "embedding_model" in tree:
        message = "The metric cosine needs an embedding model, which this server does not load; use another metric."
        raise ApiError(message, code=CODE, param=f"{param}.evaluation_metric")
    parts = tree.get("graders")
    if tree["type"] != "multi" or parts is None:
        return
    if not isinstance(parts, dict):
        message = f"Invalid type for '{param}.graders': expected an object, but got {_kind(parts)} instead."
        raise ApiError(message, code=CODE, param=f"{param}.graders")
    for key, part in parts.items():
        _check_tree(part, f"{param}.graders.{key}")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "an integer", float: "a number"}
    return names.get(type(value), "null")


def _check_urls(services: Services, spec: Any, param: str) -> None:
    for path, part in _parts(spec, param):
        if isinstance(part, EndpointSpec):
            services.outgoing.check(part.url, f"{path}.url")


def _parts(spec: Any, param: str) -> list[tuple[str, Any]]:
    if not isinstance(spec, MultiSpec):
        return [(param, spec)]
    return [(f"{param}.graders.{key}", part) for key, part in spec.graders.items()]


def remote_judge(base: RemoteModel, name: str) -> JudgeConfig:
    """Where the model that clients call `name` is."""
    return JudgeConfig(
        url=base.url,
        model=base.model or name,
        api_key_env=base.api_key_env,
        max_concurrent=base.max_concurrent,
        timeout_s=base.timeout_s,
    )


def grader_tools(services: Services, spec: Any, project: str) -> GraderTools:
    """For one grader; its judges are the caller's to close. Local models are asked through `services.inference`.

    Raises ApiError (404) for an unknown name.
    """
    judges = Judges()
    for name in judge_models(spec):
        target = services.models.judge(name, project)
        if isinstance(target.base, RemoteModel):
            judges.add(Judge(name, remote_judge(target.base, target.name)))
        else:
            judges.add(LocalJudge(name, target, services.inference))
    return GraderTools(judges)
