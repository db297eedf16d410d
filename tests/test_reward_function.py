"""TRL's reward functions as graders."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import ValidationError

from rft.graders.reward_function import RewardFunctionGrader, RewardFunctionSpec
from rft.graders.sample import sample_of_text
from rft.types import Grade, Item

ROW = {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4", "weight": 0.5}


def grade(source: str, answer: str = "4") -> Grade:
    async def story() -> Grade:
        grader = RewardFunctionGrader(RewardFunctionSpec(source=source, function="reward"))
        try:
            await grader.start()
            return await grader.grade(Item(id="1", row=ROW, messages=[]), sample_of_text(answer))
        finally:
            await grader.close()

    return asyncio.run(story())


def function(body: str, arguments: str = "prompts, completions, **kwargs") -> str:
    return f"def reward({arguments}):\n    {body}\n"


@pytest.mark.parametrize(
    ("source", "score"),
    [
        # as TRL's documentation writes them: conversational completions, columns by name
        (
            function(
                "return [float(c[0]['content'] == a) * w for c, a, w in zip(completions, answer, weight)]",
                "completions, answer, weight, **kwargs",
            ),
            0.5,
        ),
        (function("return [float(p[-1]['content'].startswith('2')) for p in prompts]"), 1.0),
        (function("return [len(kwargs['answer'])]"), 1.0),
        ("import numpy as np\n" + function("return np.array([0.25])"), 0.25),
        (function("return (0.5,)"), 0.5),
    ],
)
def test_functions_as_trl_takes_them(source: str, score: float) -> None:
    found = grade(source)
    assert (found.score, found.errors) == (score, {})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return [1.0, 2.0]", "2 scores for 1 completion"),
        ("return [None]", "does not apply"),
        ("return []", "0 scores"),
        ("return 1.0", "not iterable"),
        ("raise KeyError('gold')", "gold"),
        ("return ['good']", "not a finite number"),
    ],
)
def test_what_is_no_score_is_zero_and_flagged(body: str, problem: str) -> None:
    found = grade(function(body))
    assert found.score == 0.0
    assert problem in found.errors["python_grader_runtime_error"]


@pytest.mark.parametrize(
    ("source", "name", "problem"),
    [
        ("x = 1", "reward", "defines `reward` 0 times"),
        ("def reward(a): return a", "reward", "must take"),
        ("def reward(:", "reward", "not valid Python"),
        (function("return 1"), "reward()", "pattern"),
        ("def grade(prompts, completions, **kw): return [1]", "grade", "give the reward function another"),
        ("#" * 256_000 + "\n" + function("return [1]"), "reward", "256 kB"),
    ],
)
def test_what_is_refused(source: str, name: str, problem: str) -> None:
    fields: dict[str, Any] = {"source": source, "function": name}
    with pytest.raises(ValidationError, match=problem):
        RewardFunctionSpec(**fields)
