"""Means with intervals over items, and the measures of rollouts."""

from __future__ import annotations

import math

import pytest

from rft.metrics import mean_ci95, rollout_metrics
from rft.types import Grade, Group, Item, Message, Rollout, StopReason, ToolCall, ToolResult, Turn


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
    return Group(item, 1, list(rollouts), num_discarded=1)


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
    assert row["stop/answered"] == 1.0
    assert (row["num_items"], row["num_rollouts"], row["num_discarded"]) == (2, 3, 2)
