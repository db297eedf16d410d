"""The method of a job, beyond the shape of its body: its grader, its tools, the URLs they name, and its wire form.

Every refusal names its field (`method.reinforcement.grader.graders.a.operation`). Header values are secrets:
`wire_form` never holds one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr, ValidationError

from rft.envs.http import HttpToolConfig
from rft.errors import ConfigError
from rft.graders.run import validate
from rft.server.errors import ApiError, of_user_error
from rft.server.jobs.bodies import MethodBody, ReinforcementBody, SupervisedBody, ToolBody
from rft.server.outgoing import Outgoing

GRADER = "method.reinforcement.grader"
TOOLS = "method.reinforcement.tools"
REDACTED = "[redacted]"
_SECRET = re.compile(r"key|token|secret|password|auth|cookie", re.IGNORECASE)  # of further keys of a tool
_PARTS = ("string_check", "text_similarity", "python", "score_model", "label_model", "endpoint")
_TYPES = ("string_check", "text_similarity", "python", "score_model", "endpoint", "multi")


@dataclass(frozen=True, slots=True)
class Method:
    """A method that can be trained. `grader` (a GraderSpec) and `tools` are those of reinforcement."""

    body: MethodBody
    grader: Any = None
    tools: tuple[HttpToolConfig, ...] = ()

    @property
    def reinforcement(self) -> ReinforcementBody | None:
        return self.body.reinforcement

    @property
    def judges(self) -> list[tuple[str, str]]:
        """(param, model) of everything that the grader asks for judgements."""
        specs = specs_of(self.grader) if self.grader is not None else ()
        return [(f"{param}.model", spec.model) for param, spec in specs if hasattr(spec, "model")]


async def accept(body: MethodBody, outgoing: Outgoing) -> Method:
    """The method, its URLs looked at. Raises ApiError naming the first field that is wrong."""
    given = body.reinforcement
    if given is None:
        return Method(body)
    method = Method(body, grader_of(given.grader), tuple(_tools(given.tools or [])))
    urls = [(tool.server_url, f"{TOOLS}.{index}.server_url") for index, tool in enumerate(method.tools)]
    urls += [(spec.url, f"{param}.url") for param, spec in specs_of(method.grader) if hasattr(spec, "url")]
    for url, param in dict(urls).items():
        await asyncio.to_thread(outgoing.check, url, param)  # may wait for a name to resolve
    return method


def grader_of(tree: dict[str, Any]) -> Any:
    """The grader's spec, named. Raises ApiError (invalid_grader)."""
    _check_types(tree)
    try:
        return validate(tree, GRADER)
    except ConfigError as error:
        raise of_user_error(ConfigError(error.problem, where=error.where), code="invalid_grader") from None


def specs_of(spec: Any) -> Iterator[tuple[str, Any]]:
    """(param, spec) of a grader and its parts."""
    yield GRADER, spec
    for key, part in getattr(spec, "graders", {}).items():
        yield f"{GRADER}.graders.{key}", part


def wire_form(method: Method) -> dict[str, Any]:
    """As the job's object shows it: every hyperparameter, no secret."""
    given = method.reinforcement
    if given is None:
        supervised = method.body.supervised or SupervisedBody()
        return {"type": "supervised", "supervised": {"hyperparameters": supervised.hyperparameters.model_dump()}}
    form = given.response_format
    section: dict[str, Any] = {
        "hyperparameters": given.hyperparameters.model_dump(),
        "grader": without_secrets(method.grader),
        "response_format": form.model_dump(exclude_none=True) if form is not None else None,
    }
    if given.tools is not None:
        section["tools"] = [_shown_tool(tool) for tool in given.tools]
    if given.max_episode_steps is not None:
        section["max_episode_steps"] = given.max_episode_steps
    return {"type": "reinforcement", "reinforcement": section}


def without_secrets(spec: Any) -> dict[str, Any]:
    """A grader's JSON: the fields that were set, header values redacted."""
    shown: dict[str, Any] = _shown(spec.model_dump(mode="python", exclude_unset=True))
    return shown


def revealed(tree: Any) -> Any:
    """A dump with its secrets, as plain data: for the job's own config and nothing else."""
    if isinstance(tree, SecretStr):
        return tree.get_secret_value()
    if isinstance(tree, dict):
        return {key: revealed(value) for key, value in tree.items()}
    return [revealed(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _shown(tree: Any) -> Any:
    if isinstance(tree, SecretStr):
        return REDACTED
    if isinstance(tree, dict):
        return {key: _shown(value) for key, value in tree.items()}
    return [_shown(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _shown_tool(tool: ToolBody) -> dict[str, Any]:
    extra = {key: REDACTED if _SECRET.search(key) else value for key, value in (tool.model_extra or {}).items()}
    return {**_shown(tool.model_dump(mode="python", exclude_unset=True)), **extra}


def _check_types(tree: dict[str, Any]) -> None:
    """Only what the hosted service takes: other types of ours run code of this machine, or read its folders."""
    parts = tree.get("graders")
    entries = [(GRADER, tree, _TYPES)]
    if tree.get("type") == "multi" and isinstance(parts, dict):
        entries += [(f"{GRADER}.graders.{key}", part, _PARTS) for key, part in parts.items()]
    for param, part, allowed in entries:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "multi" and param != GRADER:
            continue  # refused with its own words
        if kind == "label_model" and param == GRADER:
            raise _bad_grader("label_model is only allowed inside a multi grader", f"{param}.type")
        if isinstance(part, dict) and kind not in (*allowed, "model"):
            known = ", ".join(allowed)
            raise _bad_grader(f"Unknown grader type; use one of {known}", f"{param}.type")
        if kind == "text_similarity" and part.get("evaluation_metric") == "cosine":
            text = "cosine is for evals only; reinforcement fine-tuning needs another evaluation_metric"
            raise _bad_grader(text, f"{param}.evaluation_metric")
        if kind == "text_similarity" and part.get("embedding_model") is not None:
            raise _bad_grader("unknown key", f"{param}.embedding_model")


def _bad_grader(message: str, param: str) -> ApiError:
    return ApiError(message, code="invalid_grader", param=param)


def _tools(bodies: list[ToolBody]) -> Iterator[HttpToolConfig]:
    seen: set[str] = set()
    for index, body in enumerate(bodies):
        if body.name in seen:
            message = f"The tool {body.name} appears twice."
            raise ApiError(message, code="invalid_tool", param=f"{TOOLS}.{index}.name")
        seen.add(body.name)
        yield _tool(body, f"{TOOLS}.{index}")


def _tool(body: ToolBody, param: str) -> HttpToolConfig:
    optional = {"rate_limit": body.rate_limit, "timeout_s": body.timeout_s, "function": body.spec}
    try:
        return HttpToolConfig(
            name=body.name,
            server_url=body.server_url,
            headers=body.headers or {},
            extra=body.model_extra or {},
            **{key: value for key, value in optional.items() if value is not None},
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        path = ".".join([param, *map(str, problem["loc"])])
        raise ApiError(problem["msg"].removeprefix("Value error, "), code="invalid_tool", param=path) from None
