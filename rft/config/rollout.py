"""The section rollout: the limits of one rollout, and the form of its answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rft.config.section import Config


class ResponseFormat(Config):
    """The form of answers, as chat completions name it. Sampling stays free: an answer that is no JSON is flagged."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None  # name, schema, and perhaps strict and description

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        given = self.json_schema
        if (given is None) == (self.type == "json_schema"):
            raise ValueError("json_schema goes with type json_schema: {name, schema}")
        if given is None:
            return self
        if unknown := sorted(given.keys() - {"name", "schema", "strict", "description"}):
            raise ValueError(f"json_schema.{unknown[0]}: unknown key")
        if not isinstance(given.get("name"), str) or not isinstance(given.get("schema"), dict):
            raise ValueError("json_schema needs a name, and a schema that is a JSON schema")
        return self


class RolloutConfig(Config):
    """The limits of one rollout. A limit ends it with its stop reason; what it said until then is graded."""

    max_turns: int = Field(8, ge=1, description="sampled messages")
    max_episode_steps: int | None = Field(None, ge=1, description="sampled messages and tool calls together")
    max_tokens_per_turn: int = Field(512, ge=1)
    max_tokens_per_rollout: int | None = Field(None, ge=1, description="sampled ones, over all turns")
    last_turn_message: str = Field("", description="added to the tools' answers before the last turn that is allowed")
    truncated_grade: float | None = Field(
        None, allow_inf_nan=False, description="of a rollout that met a limit; null: what the grader says of it"
    )
    response_format: ResponseFormat | None = Field(
        None, description="of the last message; one that is not JSON gets the flag sample_parse_error, nothing else"
    )
    time_limit_s: float = Field(600.0, gt=0)
    temperature: float = Field(0.8, gt=0, le=2)
    max_concurrent: int = Field(
        512, ge=1, description="rollouts in flight at most; how many there are follows the engine's queue"
    )
    stall_limit_s: float | None = Field(
        None,
        gt=0,
        description="without the end of any wait of any rollout; then the run stops and says who waits"
        " for what; null: see RunConfig.stall_limit_s",
    )
    max_discarded_share: float = Field(
        0.5, ge=0, le=1, description="of a step's rollouts; beyond it the run stops and names the cause"
    )
    max_failed_grade_share: float = Field(
        0.5, ge=0, le=1, description="of a step's grades: the grader's code raised, its judge answered no number"
    )

    @property
    def max_sampled_tokens(self) -> int:
        """The tokens one rollout may sample."""
        return self.max_tokens_per_rollout or self.max_turns * self.max_tokens_per_turn
