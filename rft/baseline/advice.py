"""The verdict on a baseline: train, make the task easier, warm up first, or already solved; and how to sample.

Rules of thumb with their thresholds below. Says what the numbers say, nothing about what a task could become.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rft.baseline.chance import UselessChance
from rft.types import Record

Verdict = Literal["train", "make the task easier", "warm up first", "already solved"]

_SOLVED = 0.95  # of the way from the lowest to the highest grade
_MIN_USEFUL = 0.1  # of the groups, at the largest size that was looked at
_MANY_USEFUL = 0.5
_NEARLY_ALL = 0.8  # of what the largest groups make useful
# the squared advantages of a rollout are (n - 1) / n of the grades' variance on average: three quarters with 4
_MIN_GROUP = 4
_MIN_CALLING, _MAX_MALFORMED, _MAX_TRUNCATED = 0.5, 0.25, 0.5

_CURES: dict[Verdict, str] = {
    "train": "rft train",
    "make the task easier": "give more turns or hints, start with easier items, or let the grader reward parts of the"
    " task; a larger model helps too",
    "warm up first": "rft warmup with a few hundred demonstrations, then rft train --init-from that run",
    "already solved": "use harder items, or a stricter grader; there is nothing to gain on these",
}
_LIMITS_CURE = "raise the limits (rollout.max_tokens_per_turn, rollout.max_turns)"
_CONSTANT_CURE = "make the grader finer: `rft grade run` tries it on one answer"


class Advice(Record):
    """`rollouts_per_item` = max(2, round(base_rollouts x compute_multiplier)); both null without a training."""

    verdict: Verdict
    reason: str  # with the numbers
    cure: str
    rollouts_per_item: int | None = None
    compute_multiplier: float | None = None

    @property
    def sentence(self) -> str:
        return f"{self.verdict}: {self.reason}"


class Signs(Record):
    """What the verdict is drawn from. Shares are between 0 and 1."""

    mean: float
    lowest: float  # the least and the best grade there can be, as far as known
    highest: float
    all_lowest: float  # of the items
    all_highest: float
    all_equal_between: float
    valid_call_share: float | None  # of the rollouts; null without tools
    malformed_share: float  # of the calls
    truncated_share: float  # of the rollouts


def advise(signs: Signs, chances: Sequence[UselessChance], base_rollouts: int) -> Advice:
    """The verdict. `chances` in order of size."""
    useful = 1 - chances[-1].chance
    is_solved = signs.mean >= signs.lowest + _SOLVED * (signs.highest - signs.lowest)
    if is_solved or (useful < _MIN_USEFUL and signs.all_highest > 0.5):
        reason = f"the mean grade is {signs.mean:.3f} of at most {signs.highest:g}"
        return _advice("already solved", f"{reason}; {signs.all_highest:.0%} of the items always get that")
    if useful >= _MIN_USEFUL:
        return _training(signs, chances, base_rollouts)
    if signs.all_equal_between > max(signs.all_lowest, signs.all_highest):
        reason = f"{signs.all_equal_between:.0%} of the items get one and the same grade between the extremes"
        return _advice("make the task easier", f"{reason}: the grader does not tell attempts apart", _CONSTANT_CURE)
    never = f"{signs.all_lowest:.0%} of the items always get the lowest grade, {signs.lowest:g}"
    missing = _missing_form(signs)
    if missing:
        cure = f"{_LIMITS_CURE}, or {_CURES['warm up first']}" if signs.truncated_share > _MAX_TRUNCATED else ""
        return _advice("warm up first", f"{never}, and {missing}", cure)
    return _advice("make the task easier", f"{never}, though the form is right")


def _training(signs: Signs, chances: Sequence[UselessChance], base_rollouts: int) -> Advice:
    useful = 1 - chances[-1].chance
    chosen = next(one for one in chances if one.num_rollouts >= _MIN_GROUP and 1 - one.chance >= _NEARLY_ALL * useful)
    reason = f"{1 - chosen.chance:.0%} of the groups of {chosen.num_rollouts} rollouts have signal"
    cure = _CURES["train"]
    if 1 - chosen.chance < _MANY_USEFUL:
        cure += "; training.allocation=adaptive moves rollouts to the items that vary"
    missing = _missing_form(signs)
    if missing:
        cure += "; a short rft warmup would save steps"
        reason += f", but {missing}"
    size = chosen.num_rollouts
    return _advice("train", reason, cure, rollouts=size, multiplier=round(size / base_rollouts, 4))


def _missing_form(signs: Signs) -> str:
    """What the model does not master of the form of the task; "" where it does."""
    if signs.valid_call_share is not None and signs.valid_call_share < _MIN_CALLING:
        return f"only {signs.valid_call_share:.0%} of the rollouts make a valid call"
    if signs.malformed_share > _MAX_MALFORMED:
        return f"{signs.malformed_share:.0%} of the calls are malformed"
    if signs.truncated_share > _MAX_TRUNCATED:
        return f"{signs.truncated_share:.0%} of the rollouts meet a limit"
    return ""


def _advice(
    verdict: Verdict, reason: str, cure: str = "", rollouts: int | None = None, multiplier: float | None = None
) -> Advice:
    return Advice(
        verdict=verdict,
        reason=reason,
        cure=cure or _CURES[verdict],
        rollouts_per_item=rollouts,
        compute_multiplier=multiplier,
    )
