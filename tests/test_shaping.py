"""Costs: relative within a group, only among rollouts that did not fail, never in a reported grade."""

from __future__ import annotations

import pytest
from test_rollout import an_item

from rft.config import CostsConfig
from rft.metrics import rollout_metrics
from rft.shaping import cost_metrics, penalties, shaped_scores
from rft.types import Grade, Group, Message, Rollout, StopReason, ToolCall, Turn


def a_rollout(
    score: float, num_calls: int = 0, num_tokens: int = 4, seconds: float = 1.0, reasoning: int = 0
) -> Rollout:
    calls = [ToolCall(id=f"fc_{i}", call_id=f"call_{i}", name="search", arguments="{}") for i in range(num_calls)]
    turn = Turn(
        input_ids=[1],
        output_ids=[2] * num_tokens,
        logprobs=[-0.5] * num_tokens,
        finish_reason="stop",
        policy_version=0,
        message=Message(role="assistant", tool_calls=calls),
        reasoning_tokens=reasoning,
    )
    return Rollout(
        **{"id": "r", "item_id": "x", "split": "train", "step": 1, "attempt": 0, "seed": 0, "started_at": 0.0},
        turns=[turn],
        stop_reason=StopReason.ANSWERED,
        grade=Grade(score=score),
        duration_s=seconds,
    )


def a_group(*rollouts: Rollout) -> Group:
    return Group(an_item(), 1, list(rollouts))


def test_without_weights_nothing_changes() -> None:
    group = a_group(a_rollout(1.0, 3), a_rollout(0.5, 1))
    assert shaped_scores(group, CostsConfig()) == group.scores and penalties(group, CostsConfig()) == {}


def test_worked_numbers() -> None:
    group = a_group(a_rollout(1.0, 5, seconds=2.0), a_rollout(1.0, 1, seconds=4.0), a_rollout(0.5, 3, seconds=3.0))
    costs = CostsConfig(tool_calls=0.2, seconds=0.1)
    assert penalties(group, costs)["tool_calls"] == pytest.approx([0.2, 0.0, 0.1])
    assert shaped_scores(group, costs) == pytest.approx([0.8, 0.9, 0.35])
    assert cost_metrics([group], costs) == pytest.approx({"cost/tool_calls": 0.1, "cost/seconds": 0.05})


def test_doing_nothing_quickly_never_wins() -> None:
    """The failed rollout is the cheapest, keeps its 0, and does not make the others look expensive."""
    group = a_group(a_rollout(0.0, 0), a_rollout(1.0, 9), a_rollout(1.0, 9))
    assert shaped_scores(group, CostsConfig(tool_calls=0.5)) == [0.0, 1.0, 1.0]


def test_equal_grades_teach_to_be_cheap() -> None:
    group = a_group(a_rollout(1.0, 2), a_rollout(1.0, 4))
    assert not group.has_signal
    assert shaped_scores(group, CostsConfig(tool_calls=0.1)) == [1.0, 0.9]


@pytest.mark.parametrize(
    ("name", "cheap", "dear"),
    [
        ("sampled_tokens", {"num_tokens": 4}, {"num_tokens": 9}),
        ("reasoning_tokens", {"reasoning": 0}, {"reasoning": 3}),
        ("seconds", {"seconds": 1.0}, {"seconds": 2.0}),
    ],
)
def test_every_cost_is_counted(name: str, cheap: dict[str, float], dear: dict[str, float]) -> None:
    group = a_group(a_rollout(1.0, **cheap), a_rollout(1.0, **dear))  # type: ignore[arg-type]
    assert shaped_scores(group, CostsConfig.model_validate({name: 0.25})) == [1.0, 0.75]


def test_reports_show_the_whole_grade() -> None:
    group = a_group(a_rollout(1.0, 2), a_rollout(1.0, 4))
    assert rollout_metrics([group])["grade"] == 1.0
