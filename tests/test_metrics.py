"""Means with intervals over items, and the measures of rollouts."""

from __future__ import annotations

import math

import pytest

from rft.metrics import mean_ci95, rollout_metrics, stop_shares
from rft.types import Grade, Group, Item, Message, Rollout, StopReason, TokenUsage, ToolCall, ToolResult, Turn


def a_rollout(score: float, *, is_error: bool = False, item_id: str = "x") -> Rollout:
    call = ToolCall(id="fc_1", call_id="call_1", name="search", arguments="{}")
    turns = [
        Turn(
            input_ids=[1, 2],
            output_ids=[3, 4, 5],
            logprobs=[-0.1] * 3,
            finish_reason="stop",
            policy_version=0,
            message=Message(role="assistant", tool_calls=[call]),
            results=[ToolResult(call_id="call_1", output="r", is_error=is_error, latency_s=0.5)],
        )
    ]
    return Rollout(
        id="trace_1",
        item_id=item_id,
        split="train",
        step=1,
        attempt=0,
        seed=0,
        turns=turns,
        stop_reason=StopReason.ANSWERED,
        grade=Grade(score=score, shadow={"code": score / 2}),
        started_at=0.0,
        duration_s=2.0,
    )


def a_group(*rollouts: Rollout) -> Group:
    item = Item(id="x", row={}, messages=[Message(role="user", content="q")])
    return Group(item, 1, list(rollouts), discards=(StopReason.TOOL_FAILED,))


def test_the_interval_is_over_items_not_rollouts() -> None:
    mean, half = mean_ci95([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.959964 * 0.5 / math.sqrt(3))


def test_one_item_has_no_interval_and_none_no_mean() -> None:
    assert mean_ci95([[1.0]]) == (1.0, math.inf)
    assert math.isnan(mean_ci95([])[0])


def test_measures_of_groups() -> None:
    row = rollout_metrics([a_group(a_rollout(1.0), a_rollout(0.0, is_error=True)), a_group(a_rollout(1.0))])
    assert row["grade"] == pytest.approx(0.75)
    assert row["shadow/code"] == pytest.approx(0.375)
    assert row["valid_call_share"] == pytest.approx(0.75)
    assert row["tool_calls"] == 1.0
    assert row["sampled_tokens"] == 3.0
    assert row["tool_latency_s"] == pytest.approx(0.5)
    assert (row["stop/answered"], row["stop/tool_failed"]) == (0.6, 0.4), "of all that ended"
    assert stop_shares({f"train/{name}": value for name, value in row.items()}) == {"answered": 0.6, "tool_failed": 0.4}
    assert (row["num_items"], row["num_rollouts"], row["num_discarded"]) == (2, 3, 2)


def test_graders_are_measured() -> None:
    usage = {"judge": TokenUsage(prompt_tokens=10, completion_tokens=2)}
    parts = {
        "exact": Grade(score=1.0, is_cached=True),
        "judge": Grade(score=0.5, usage=usage, spread=0.1, errors={"model_grader_parse_error": "no JSON"}),
    }
    good, bad = a_rollout(0.75), a_rollout(0.25)
    assert good.grade and bad.grade
    good.grade = good.grade.model_copy(update={"parts": parts, "latency_s": 2.0})
    bad.grade = bad.grade.model_copy(
        update={"parts": {"exact": Grade(score=0.0)}, "shadow": {}, "shadow_errors": {"code": "x"}}
    )
    row = rollout_metrics([a_group(good), a_group(bad)])
    assert (row["part/exact"], row["part/judge"]) == (0.5, 0.5), "a part that is missing is left out of its mean"
    assert row["shadow/code"] == pytest.approx(0.375)
    assert row["grader/cache_hit_share"] == pytest.approx(1 / 3)
    assert (row["grader/prompt_tokens"], row["grader/completion_tokens"]) == (10, 2)
    assert row["grader/judge_spread"] == pytest.approx(0.1)
    assert (row["grader_errors"], row["grader_error/model_grader_parse_error"], row["grader/shadow_errors"]) == (
        1,
        1,
        1,
    )


def test_parts_judges_and_tools_are_broken_down() -> None:
    usage = {"a/b": TokenUsage(prompt_tokens=10, completion_tokens=2, cached_tokens=1)}
    part = Grade(score=0.5, usage=usage, latency_s=0.2, errors={"model_grader_parse_error": "no JSON"})
    good, bad = a_rollout(1.0), a_rollout(0.0, is_error=True)
    good.grade = Grade(score=1.0, parts={"judge": part, "exact": Grade(score=1.0)})
    search = {"type": "function", "function": {"name": "search", "parameters": {}}}
    item = Item(id="x", row={}, messages=[Message(role="user", content="q")], tools=[search])
    made_up = ToolCall(id="fc_2", call_id="call_2", name="nothing/such", arguments="{}")
    bad.turns[0].message.tool_calls.append(made_up)
    answer = Message(role="assistant", content="done")
    bad.turns.append(bad.turns[0].model_copy(update={"message": answer, "input_ids": [7] * 4, "reasoning_tokens": 2}))
    row = rollout_metrics([Group(item, 1, [good, bad])])
    assert (row["part_num/judge"], row["part_latency_s/judge"], row["part_prompt_tokens/judge"]) == (1, 0.2, 10)
    assert row["part_error/judge/model_grader_parse_error"] == 1 and "part_error/exact/x" not in row
    assert (row["judge_num/a/b"], row["judge_completion_tokens/a/b"], row["judge_cached_tokens/a/b"]) == (1, 2, 1)
    assert (row["tool_num/search"], row["tool_errors/search"], row["tool_latency_s/search"]) == (2, 1, 0.5)
    assert row["unknown_tool_calls"] == 1 and not any("nothing" in key for key in row)
    assert row["tool_answer_tokens"] == 4.0, "of the one answer that a later turn has in its prompt"
    assert (row["num_graded"], row["num_sampled_tokens"], row["num_reasoning_tokens"]) == (2, 9, 2)
    assert row["unresponsive_share"] == 0.5 and row["reasoning_tokens"] == 1.0
