"""What clients send to create a fine-tuning job, as the SDK and the published Agent RFT notebooks write it.

Ranges are the hosted contract's. A field outside of its range is refused with the code of its kind, an unknown field
by its name. The published sketch (`method: "rft"`, `rft: {...}`, tools with `url`) becomes the contract's form here.
What a grader may say is rft.graders' business; hosts of URLs are checked where the job is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SecretStr,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from rft.config import ResponseFormat

Auto = Literal["auto"]
Effort = Literal["default", "low", "medium", "high"]
_EFFORTS = ("default", "low", "medium", "high")
_MAX_SEED = 2147483647
_MAX_DEPTH = 64
_HUGE = 1e6  # a number without a bound of its own is still one that arithmetic survives


class Body(BaseModel):
    """A part of a request. Input never appears in an error: it may hold keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


@dataclass(frozen=True, slots=True)
class Number:
    """Marks a field that is "auto" or a number in a range. `lowest` is allowed for whole numbers only."""

    lowest: float
    highest: float | None = None
    is_whole: bool = True

    def check(self, value: Any) -> float | str:
        if value is None or value == "auto":
            return "auto"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_above = is_number and (value >= self.lowest if self.is_whole else value > self.lowest)
        if not is_above or value > (self.highest or _HUGE) or (self.is_whole and value != int(value)):
            raise PydanticCustomError("invalid_hyperparameter", "must be 'auto' or {range}", {"range": self.range})
        return int(value) if self.is_whole else float(value)

    @property
    def range(self) -> str:
        kind, lowest = ("a whole number", "from") if self.is_whole else ("a number", "above")
        highest = f" to {self.highest:g}" if self.highest is not None else ""
        return f"{kind} {lowest} {self.lowest:.5f}".rstrip("0").rstrip(".") + (highest or " on")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        number = {"type": "integer" if self.is_whole else "number"}
        limits = {"minimum" if self.is_whole else "exclusiveMinimum": self.lowest}
        limits |= {"maximum": self.highest} if self.highest is not None else {}
        return {"anyOf": [{"const": "auto"}, number | limits]}


def _effort(value: Any) -> Any:
    if value is None:
        return "default"
    if value not in _EFFORTS:
        raise PydanticCustomError("invalid_hyperparameter", "must be one of {values}", {"values": ", ".join(_EFFORTS)})
    return value


class SupervisedHyperparameters(Body):
    """Of `supervised`, and the deprecated ones at the top of the request."""

    n_epochs: Annotated[int | Auto, Number(1, 50)] = "auto"
    batch_size: Annotated[int | Auto, Number(1, 256)] = "auto"
    learning_rate_multiplier: Annotated[float | Auto, Number(0, is_whole=False)] = "auto"


class Hyperparameters(SupervisedHyperparameters):
    """Of `reinforcement`; "auto" becomes a number when the rows are counted."""

    compute_multiplier: Annotated[float | Auto, Number(0.00001, 10, is_whole=False)] = "auto"
    eval_interval: Annotated[int | Auto, Number(1)] = "auto"
    eval_samples: Annotated[int | Auto, Number(1)] = "auto"
    reasoning_effort: Annotated[Effort, BeforeValidator(_effort)] = "default"


class ToolBody(BaseModel):
    """A tool and its endpoint. What is not named here is sent with every call.

    `function` ({description, parameters}, or the whole function tool) or `parameters` is its spec for rows that name
    no tools. `rate_limit` (requests per second) and `timeout_s` are ours.
    """

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    server_url: str = Field(min_length=1, max_length=2048)
    headers: dict[str, SecretStr] | None = None
    rate_limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    timeout_s: float | None = Field(None, gt=0, le=3600, allow_inf_nan=False)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    function: dict[str, Any] | None = None

    @property
    def spec(self) -> dict[str, Any] | None:
        """Its entry in the `tools` of a row that has none."""
        given = dict(self.function or {})
        given = dict(given["function"]) if isinstance(given.get("function"), dict) else given
        if self.function is None and self.parameters is None:
            return None
        written = {"description": self.description, "parameters": self.parameters}
        given = {key: value for key, value in written.items() if value is not None} | given
        return {"type": "function", "function": {**given, "name": self.name}}

    @model_validator(mode="after")
    def _spec_is_a_function(self) -> ToolBody:
        function = (self.spec or {"function": {}})["function"]
        parameters = function.get("parameters", {})
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise ValueError('parameters must be a JSON schema of type "object"')
        if not isinstance(function.get("description", ""), str):
            raise ValueError("description must be a string")
        return self


class ReinforcementBody(Body):
    """`method.reinforcement`."""

    grader: dict[str, Any]
    hyperparameters: Hyperparameters = Hyperparameters()
    response_format: ResponseFormat | None = None
    tools: list[ToolBody] | None = Field(None, max_length=128)
    max_episode_steps: int | None = Field(None, ge=1, strict=True)


class SupervisedBody(Body):
    """`method.supervised`."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class MethodBody(Body):
    """How to train. Method `dpo` is known and refused."""

    type: Literal["reinforcement", "supervised"]
    reinforcement: ReinforcementBody | None = None
    supervised: SupervisedBody | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_supported(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "dpo":
            text = "dpo is not supported by this server; use reinforcement (a grader) or supervised (demonstrations)"
            raise PydanticCustomError("unsupported_method", text)
        return value

    @model_validator(mode="after")
    def _has_its_own_section(self) -> MethodBody:
        other = "supervised" if self.type == "reinforcement" else "reinforcement"
        if getattr(self, other) is not None:
            raise ValueError(f"type is {self.type}, but {other} is given too")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("type is reinforcement, and reinforcement: {grader: ...} is missing")
        return self


class WandbBody(Body):
    """Where metrics go at Weights & Biases."""

    project: str = Field(min_length=1, max_length=128)
    entity: str | None = Field(None, max_length=128)
    name: str | None = Field(None, max_length=128)
    tags: list[Annotated[str, Field(max_length=64)]] = Field(default_factory=list, max_length=50)


class IntegrationBody(Body):
    type: Literal["wandb"]
    wandb: WandbBody


Metadata = dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]]


class JobBody(Body):
    """The body of `fine_tuning.jobs.create`."""

    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=128)
    validation_file: str | None = Field(None, max_length=128)
    method: MethodBody = MethodBody(type="supervised")
    suffix: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]{1,64}$", description="letters, digits, `.`, `_` and `-`: part of a model's name"
    )
    seed: int | None = Field(None, ge=0, le=_MAX_SEED, strict=True)
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    integrations: list[IntegrationBody] | None = Field(None, max_length=5)
    hyperparameters: SupervisedHyperparameters | None = Field(None, json_schema_extra={"deprecated": True})

    @model_validator(mode="before")
    @classmethod
    def _in_one_form(cls, value: Any) -> Any:
        _check_json(value)
        return _supervised_by_default(_from_sketch(value)) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _hyperparameters_have_one_place(self) -> JobBody:
        if self.hyperparameters is not None and self.method.type != "supervised":
            raise ValueError("hyperparameters: put them into method.reinforcement.hyperparameters")
        return self


def _check_json(value: Any, depth: int = 0) -> None:
    """Raises ValueError for what Python's parser lets pass and no file could hold, or no code could walk through."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"the request is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("the request has a text with half of a surrogate pair (\\ud800..\\udfff)") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN and Infinity are no JSON numbers")
    if isinstance(value, dict | list):
        for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            _check_json(part, depth + 1)


def _from_sketch(body: dict[str, Any]) -> dict[str, Any]:
    """The published sketch, `method: "rft"` with a section `rft`, in the contract's form."""
    if body.get("method") != "rft":
        return body
    sketch = body.get("rft")
    if not isinstance(sketch, dict):
        raise ValueError('method "rft" needs the section rft: {grader, tools, hyperparameters}')
    tools = sketch.get("tools")
    if isinstance(tools, list):
        sketch = {**sketch, "tools": [_with_server_url(tool) for tool in tools]}
    rest = {key: part for key, part in body.items() if key != "rft"}
    return {**rest, "method": {"type": "reinforcement", "reinforcement": sketch}}


def _with_server_url(tool: Any) -> Any:
    if not isinstance(tool, dict) or "url" not in tool or "server_url" in tool:
        return tool
    return {"server_url" if key == "url" else key: part for key, part in tool.items()}


def _supervised_by_default(body: dict[str, Any]) -> dict[str, Any]:
    """Without a method the job is supervised, with the deprecated hyperparameters at the top of the request."""
    method = body.get("method")
    if method is None:
        method = {"type": "supervised"}
    if isinstance(method, dict) and method.get("type") == "supervised" and body.get("hyperparameters") is not None:
        given = method.get("supervised") or {}
        if isinstance(given, dict):
            method = {**method, "supervised": {"hyperparameters": body["hyperparameters"], **given}}
    return {**body, "method": method}


class PermissionBody(Body):
    """The body of `checkpoints.permissions.create`."""

    project_ids: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]] = Field(min_length=1, max_length=100)
