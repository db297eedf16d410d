"""The environment grader: what the environment says, as it is, or no grade at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rft.errors import ConfigError, GraderError
from rft.graders import build_grader
from rft.graders.run import validate
from rft.types import Grade, Item

SAMPLE = {"environment": {"reward": 0.25, "done": True, "metrics": {"f1": 3}, "name": "x", "none": None}}
ITEM = Item(id="i", row={}, messages=[])


def grade(sample: dict[str, Any] | None = None, **spec: Any) -> Grade:
    grader = build_grader(validate({"type": "environment", **spec}))
    return asyncio.run(grader.grade(ITEM, SAMPLE if sample is None else sample))


@pytest.mark.parametrize(
    ("spec", "score"),
    [
        ({}, 0.25),
        ({"key": "done"}, 1.0),
        ({"key": "metrics.f1"}, 3.0),
        ({"key": "metrics.f1", "range": [0, 1]}, 1.0),
        ({"range": [0.5, 1]}, 0.5),
    ],
)
def test_the_score_is_the_value(spec: dict[str, Any], score: float) -> None:
    assert grade(**spec).score == score


@pytest.mark.parametrize(
    ("sample", "key", "words"),
    [
        ({}, "reward", "sample.environment has no reward; the environment said: nothing"),
        (SAMPLE, "score", "no score; the environment said: reward, done, metrics, name, none"),
        (SAMPLE, "reward.x", "no reward.x"),
        (SAMPLE, "name", "sample.environment.name is 'x', not a finite number"),
        (SAMPLE, "none", "is None, not a finite number"),
        ({"environment": {"reward": float("nan")}}, "reward", "is nan"),
        ({"environment": {"reward": 10**400}}, "reward", "not a finite number"),
    ],
)
def test_no_value_is_no_grade(sample: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(GraderError) as caught:
        grade(sample, key=key)
    assert words in str(caught.value)
    assert caught.value.flag == "invalid_variable_error"


def test_it_is_a_part_of_a_multi_grader() -> None:
    parts = {"world": {"type": "environment"}, "text": {"type": "environment", "key": "metrics.f1"}}
    spec = validate({"type": "multi", "graders": parts, "calculate_output": "world * 2 + text"})
    assert asyncio.run(build_grader(spec).grade(ITEM, SAMPLE)).score == 3.5


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"key": ""}, "grader.key"),
        ({"range": [1, 1]}, "grader: range: 1 is not below 1"),
        ({"keys": "x"}, "grader.keys: unknown key"),
    ],
)
def test_a_wrong_spec_is_named(spec: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"type": "environment", **spec})
    assert where in str(caught.value)
