"""The numbers of a baseline: worked by hand, against enumeration, and read from run folders of every kind."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from run_folders import TOOL, a_rollout, a_run, an_item
from test_cli import rft

from rft.baseline.advice import Advice, Signs, advise
from rft.baseline.chance import UselessChance, all_equal_smoothed, all_equal_unbiased, useless_chances
from rft.baseline.numbers import baseline_of, measure, percentile
from rft.baseline.presentation import draw, table, write_baseline
from rft.errors import UserError
from rft.store import RunStore
from rft.types import Grade, Rollout, StopReason, TokenUsage


def graded(item: int, *scores: float, **changes: Any) -> list[Rollout]:
    """Rollouts of an item, each with one call of `search`."""
    return [
        a_rollout(an_item(item), "train", 1, attempt, 0.0).model_copy(update={"grade": Grade(score=score), **changes})
        for attempt, score in enumerate(scores)
    ]


def counts_of(scores: tuple[float, ...]) -> list[int]:
    return [scores.count(value) for value in sorted(set(scores))]


# --- P(useless group) ---


@pytest.mark.parametrize("scores", [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0.0, 0.25, 0.25, 1.0, 1.0, 1.0)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_unbiased_chance_is_the_share_of_all_groups(scores: tuple[float, ...], size: int) -> None:
    groups = list(itertools.combinations(scores, size))
    share = sum(len(set(group)) == 1 for group in groups) / len(groups)
    assert all_equal_unbiased(counts_of(scores), size) == pytest.approx(share)


@pytest.mark.parametrize("size", [2, 4])
def test_the_unbiased_chance_is_right_on_average_over_all_samples(size: int) -> None:
    """Of every sample of 5 rollouts of an item that succeeds with probability 0.3, weighed by its probability."""
    expected = 0.0
    for sample in itertools.product((0, 1), repeat=5):
        probability = math.prod(0.3 if score else 0.7 for score in sample)
        expected += probability * all_equal_unbiased(counts_of(sample), size)
    assert expected == pytest.approx(0.3**size + 0.7**size)


def test_more_rollouts_than_were_sampled_are_no_group_of_them() -> None:
    with pytest.raises(ValueError, match="groups of 5 cannot be drawn from 4"):
        all_equal_unbiased([4], 5)


def test_the_smoothed_chance_is_that_of_the_urn_by_enumeration() -> None:
    """Draw after draw, a grade comes with probability (its count + its share of the prior) / (all + 1)."""
    counts, prior, size = [3, 1], [0.75, 0.25], 4
    chance = 0.0
    for draws in itertools.product((0, 1), repeat=size):
        held, probability = [count + share for count, share in zip(counts, prior, strict=True)], 1.0
        for value in draws:
            probability *= held[value] / sum(held)
            held[value] += 1
        chance += probability * (len(set(draws)) == 1)
    assert all_equal_smoothed(counts, prior, size) == pytest.approx(chance)


def test_an_item_that_always_failed_may_still_succeed_if_others_do() -> None:
    never, half = [0.0] * 4, [0.0, 1.0, 0.0, 1.0]
    alone = useless_chances([never])
    assert [one.chance for one in alone] == [1.0, 1.0, 1.0, 1.0], "no success was ever seen"
    assert [one.estimator for one in alone] == ["unbiased", "unbiased", "smoothed", "smoothed"]
    beside = useless_chances([never, half])
    assert beside[0].chance == pytest.approx((1 + 1 / 3) / 2)
    assert beside[1].chance == pytest.approx(0.5)
    assert 0.3 < beside[3].chance < beside[2].chance < 0.5


def test_chances_never_grow_with_the_group() -> None:
    draw_grade = random.Random(0)
    for _ in range(50):
        scores = [[draw_grade.choice([0.0, 0.5, 1.0]) for _ in range(4)] for _ in range(5)]
        chances = [one.chance for one in useless_chances(scores)]
        assert all(0 <= b <= a <= 1 for a, b in itertools.pairwise(chances))


# --- the numbers ---


def test_numbers_worked_by_hand() -> None:
    rollouts = [*graded(0, 0, 0, 0, 0), *graded(1, 0, 1, 0, 1), *graded(2, 1, 1, 1, 1), *graded(3, 0.5, 0.5, 0.5, 0.5)]
    found = measure(rollouts, 8, has_tools=True)
    assert (found.num_items, found.num_rollouts) == (4, 16)
    assert found.mean == pytest.approx((0 + 0.5 + 1 + 0.5) / 4)
    assert found.maximum == pytest.approx((0 + 1 + 1 + 0.5) / 4)
    assert found.headroom == pytest.approx(0.125)
    assert (found.all_lowest, found.all_highest, found.all_equal_between, found.varied) == (0.25, 0.25, 0.25, 0.25)
    assert found.deviation == pytest.approx(math.sqrt(1 / 3) / 4)
    assert [item.maximum for item in found.items] == [0, 1, 1, 0.5]
    assert found.useless[0].chance == pytest.approx((3 + 1 / 3) / 4)
    assert (found.tool_calls.mean, found.tool_calls.p95) == (1, 1)
    assert (found.sampled_tokens.mean, found.reasoning_tokens.mean) == (6, 1)
    assert (found.valid_call_share, found.malformed_share, found.truncated_share) == (1, 0, 0)


def test_discarded_and_malformed_and_cut_rollouts_are_told() -> None:
    broken = graded(0, 0.0, 0.0, stop_reason=StopReason.MAX_TOKENS)
    broken[0].turns[0].message.tool_calls[0].error = "not JSON"
    gone = a_rollout(an_item(0), "train", 1, 9, 0.0)
    gone = gone.model_copy(update={"grade": None, "stop_reason": StopReason.TOOL_FAILED})
    found = measure([*broken, *graded(1, 0.0, 1.0), gone], 8, has_tools=True)
    assert (found.num_discarded, found.malformed_share, found.truncated_share) == (1, 0.25, 0.5)


def test_one_rollout_per_item_says_nothing() -> None:
    with pytest.raises(UserError, match="no item has two graded rollouts"):
        measure([*graded(0, 1.0), *graded(1, 0.0)], 8, has_tools=False)


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile([7], 0.95) == 7


# --- the verdict ---


def signs(**changes: Any) -> Signs:
    fields: dict[str, Any] = {"mean": 0.2, "lowest": 0, "highest": 1, "all_lowest": 0.5, "all_highest": 0}
    fields |= {"all_equal_between": 0, "valid_call_share": 0.9, "malformed_share": 0, "truncated_share": 0}
    return Signs(**fields | changes)


def judged(chances: list[float], base_rollouts: int = 8, **changes: Any) -> Advice:
    sizes = (2, 4, 8, 16)
    found = [UselessChance(num_rollouts=n, chance=c, estimator="unbiased") for n, c in zip(sizes, chances, strict=True)]
    return advise(signs(**changes), found, base_rollouts)


@pytest.mark.parametrize(
    ("chances", "changes", "verdict"),
    [
        ([0.8, 0.6, 0.4, 0.2], {}, "train"),
        ([1, 1, 1, 1], {"all_lowest": 1, "mean": 0}, "make the task easier"),
        ([1, 1, 1, 1], {"all_lowest": 1, "mean": 0, "valid_call_share": 0.1}, "warm up first"),
        ([1, 1, 1, 1], {"all_lowest": 1, "mean": 0, "malformed_share": 0.6}, "warm up first"),
        ([1, 1, 1, 1], {"all_lowest": 1, "mean": 0, "truncated_share": 0.6}, "warm up first"),
        ([1, 1, 1, 1], {"all_lowest": 1, "mean": 0, "valid_call_share": None}, "make the task easier"),
        ([1, 1, 1, 1], {"all_equal_between": 1, "all_lowest": 0, "mean": 0.5}, "make the task easier"),
        ([1, 1, 1, 1], {"all_highest": 1, "all_lowest": 0, "mean": 1}, "already solved"),
        ([0.9, 0.8, 0.7, 0.6], {"all_highest": 0.8, "all_lowest": 0, "mean": 0.96}, "already solved"),
    ],
)
def test_the_verdict(chances: list[float], changes: dict[str, Any], verdict: str) -> None:
    found = judged(chances, **changes)
    assert found.verdict == verdict and found.reason and found.cure
    assert (found.rollouts_per_item is not None) == (verdict == "train")


@pytest.mark.parametrize(
    ("chances", "base", "rollouts"),
    [([0.5, 0.1, 0.05, 0.0], 8, 4), ([0.9, 0.7, 0.4, 0.3], 8, 8), ([0.9, 0.8, 0.6, 0.2], 6, 16)],
)
def test_the_multiplier_gives_the_recommended_rollouts(chances: list[float], base: int, rollouts: int) -> None:
    found = judged(chances, base)
    assert found.rollouts_per_item == rollouts
    assert found.compute_multiplier is not None
    assert max(2, round(base * found.compute_multiplier)) == rollouts


# --- run folders ---


def test_of_a_training_run_the_untrained_weights_are_judged(tmp_path: Path) -> None:
    """run_folders writes version = step; the oldest version of the training split is that of step 1."""
    store = a_run(tmp_path, steps=3, num_rollouts=4, score=lambda step, attempt: float(step > 1))
    found = baseline_of(store)
    assert (found.split, found.num_items, found.num_rollouts) == ("train", 3, 12)
    assert found.all_equal_between == 1.0, "every rollout of step 1 has the grade 0.5"
    assert baseline_of(store, "validation").num_rollouts == 12


def test_a_run_that_is_cut_or_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    store = a_run(tmp_path, steps=1, num_rollouts=4)
    with store.rollout_path(1).open("ab") as file:
        file.write(b'{"id": "trace_0", "unknown": 1}\n{"id": "trac')
    found = baseline_of(store)
    assert found.num_rollouts == 12
    assert found.problems == ["2 stored rollouts could not be read and are not counted"]


def test_a_split_without_rollouts_names_those_there_are(tmp_path: Path) -> None:
    store = a_run(tmp_path, steps=1)
    with pytest.raises(UserError, match=r"no rollouts of the split test(.|\n)*train, validation"):
        baseline_of(store, "test")


@pytest.mark.slow
def test_the_command_reads_a_folder(tmp_path: Path) -> None:
    store = a_run(tmp_path, steps=1, num_rollouts=4)
    shown = rft("baseline", str(store.path))
    assert shown.returncode == 0, shown.stderr
    assert "verdict: train" in shown.stdout and "P(useless group), 16 rollouts, smoothed" in shown.stdout
    assert (store.path / "baseline.png").read_bytes().startswith(b"\x89PNG")
    as_json = rft("baseline", str(store.path), "--json")
    assert json.loads(as_json.stdout) == json.loads((store.path / "baseline.json").read_text())
    refused = rft("baseline", str(store.path), "training.steps=1")
    assert refused.returncode == 2 and "this folder is only read" in refused.stderr


def test_hostile_names_are_harmless(tmp_path: Path) -> None:
    evil = "\x1b[2J$\\frac{‮"
    store = RunStore.create(tmp_path, "evil", {"model": {"path": evil}})
    for rollout in [*graded(0, 0.0, 1.0)]:
        store.append_rollout(rollout.model_copy(update={"item_id": evil}))
    found = baseline_of(store)
    write_baseline(store, found)
    from rich.console import Console

    console = Console(file=(tmp_path / "out.txt").open("w", encoding="utf-8"), force_terminal=False)
    console.print(table(found, is_boxed=True))
    console.file.close()
    assert "\x1b" not in (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert draw(found).startswith(b"\x89PNG")
    store.close()


def test_rollouts_without_ids_count_what_the_server_said() -> None:
    """A model behind a URL: its tokens are in `usage`, and nothing of it can be trained on."""
    rollout = graded(0, 1.0)[0]
    for turn, prompt in zip(rollout.turns, (10, 30), strict=True):
        turn.input_ids, turn.output_ids, turn.logprobs = [], [], []
        turn.usage = TokenUsage(prompt_tokens=prompt, completion_tokens=5)
    assert rollout.num_sampled_tokens == 10
    assert rollout.num_prompt_tokens == 25
    assert rollout.sequences == []
    assert TOOL["function"]["name"] == "search"
