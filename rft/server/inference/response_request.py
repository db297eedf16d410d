"""What POST /responses takes, and its input as items with ids."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rft.server.ids import new_id

_PREFIXES = {"function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


class ResponseRequest(BaseModel):
    """What POST /responses takes; the last fields change nothing here."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str | list[dict[str, Any]] = Field(default_factory=list)
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    store: bool | None = None
    previous_response_id: str | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None
    stream_options: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="nothing is left out: too long is an error"
    )
    user: str | None = None
    max_tool_calls: int | None = Field(None, description="counts built-in tools, of which there are none")
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def seals_reasoning(self) -> bool:
        return "reasoning.encrypted_content" in (self.include or [])

    @property
    def has_summary(self) -> bool:
        asked = self.reasoning or {}
        return (asked.get("summary") or asked.get("generate_summary")) is not None

    @property
    def items(self) -> list[dict[str, Any]]:
        """The input as items with ids."""
        if isinstance(self.input, str):
            return [_user_item(self.input)]
        return [_with_id(item) for item in self.input]


def _user_item(text: str) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"id": new_id("msg_"), "type": "message", "role": "user", "status": "completed", "content": content}


def _with_id(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type") or "message"
    return {"type": kind, **item, "id": item.get("id") or new_id(_PREFIXES.get(kind, "msg_"))}
