"""What is wrong with graders: failures that became scores, one grade for everything, noise, shadows that disagree."""

from __future__ import annotations

import ast
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from rft.doctor.case import Case, Row, grouped, ids_of, interval, mean, numbers, score_of, total, words
from rft.doctor.finding import Finding
from rft.types import Rollout

FAILURE_SHARE, FAILURE_SHARE_HIGH = 0.02, 0.2  # of the grades: a fifth wrong turns advantages around
FLAG_SHARE = 0.3  # of the grades: answers that the grader could not read
MIN_GRADES = 16  # below, one grade for all may be chance
MIN_DIFFERENT = 0.5  # of the answers: when half of them differ, a grader that looks at them tells some apart
NOISE = 0.5  # of the spread inside groups: the judge's own noise beyond it drowns the difference
DIVERGENCE_WINDOW = 4  # steps before and after

_MAX_DETAIL = 200


def grader_failures(case: Case) -> Iterator[Finding]:
    """`grader_failures`: the grader's code or judge failed, and the rollout was graded all the same."""
    graded = case.graded
    failed = [(r, r.grade.failure) for r in graded if r.grade is not None and r.grade.failure is not None]
    if not graded or len(failed) < max(1, FAILURE_SHARE * len(graded)):
        return
    share = len(failed) / len(graded)
    text, num = Counter(detail.strip().rpartition("\n")[2] for _, detail in failed).most_common(1)[0]
    yield Finding(
        check="grader_failures",
        title="the grader fails, and its failures count as grades",
        severity="high" if share >= FAILURE_SHARE_HIGH else "medium",
        weight=share,
        evidence=f"{len(failed)} of {len(graded)} grades come from a failure, {num} of them: "
        + words(text, _MAX_DETAIL),
        numbers={"failure_share": share, "num_graded": len(graded)},
        rollout_ids=ids_of(rollout for rollout, _ in failed),
        steps=case.steps,
        cure="try the grader on one of these answers (`rft grade run`) and repair it; rollout.max_failed_grade_share"
        " says how many failures a step bears",
    )


def constant_grader(case: Case) -> Iterator[Finding]:
    """`constant_grader`: different answers, one grade, from the first step to the last.

    A grade of 0 for everything may be a model that never succeeds: then the grader is blamed only when its code returns
    nothing else, or when a shadow grader tells the same answers apart.
    """
    graded = list({rollout.id: rollout for rollout in [*case.first, *case.graded]}.values())
    scores = {score_of(rollout) for rollout in graded}
    if len(graded) < MIN_GRADES or len(scores) > 1 or not _is_constant_in(case):
        return
    (score,) = scores
    is_written = returns_one_value(case.setting("grader.source"))
    shadow = _telling_shadow(graded)
    different = _share_of_different(graded)
    if not is_written and not shadow and (score == 0 or different < MIN_DIFFERENT):
        return
    why = [f"all of {len(graded)} rollouts of all steps got the grade {score:g}"]
    why.append(f"{different:.0%} of their answers differ from the others to the same item")
    if is_written:
        why.append("its code returns nothing else")
    if shadow:
        why.append(f"the shadow grader {words(shadow, 60)} tells the same answers apart")
    yield Finding(
        check="constant_grader",
        title="the grader gives every answer the same grade",
        severity="high",
        weight=1.0,
        evidence="; ".join(why),
        numbers={"grade": score, "num_graded": len(graded), "share_of_different_answers": different},
        rollout_ids=ids_of(case.graded),
        steps=(case.training[0]["step"], case.training[-1]["step"]) if case.training else None,
        cure="try the grader on a right and on a wrong answer (`rft grade run`) and change grader until they differ;"
        " without a difference there is no gradient",
    )


def _is_constant_in(case: Case) -> bool:
    """Whether the mean grade is the same in every row, and every group without signal."""
    grades = numbers(case.training, "train/grade") + numbers(case.evaluations, "grade")
    has_signal = total(case.training, "groups/total") > total(case.training, "groups/no_signal")
    return not has_signal and (not grades or max(grades) - min(grades) < 1e-9)


def _telling_shadow(graded: Sequence[Rollout]) -> str:
    names = {name for r in graded if r.grade for name in r.grade.shadow}
    for name in sorted(names):
        if len({r.grade.shadow[name] for r in graded if r.grade and name in r.grade.shadow}) > 1:
            return name
    return ""


def _share_of_different(graded: Sequence[Rollout]) -> float:
    """Of the answers to one item in one step, as a mean over groups."""
    texts = [[rollout.output_text.strip() for rollout in group] for group in grouped(graded)]
    return fmean([len(set(answers)) / len(answers) for answers in texts] or [0.0])


def returns_one_value(source: object) -> bool:
    """Whether every `return` of a python grader's `grade` is one and the same constant."""
    try:
        tree = ast.parse(textwrap.dedent(str(source or "")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    grades = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "grade"]
    returned = [node.value for grade in grades for node in ast.walk(grade) if isinstance(node, ast.Return)]
    values = {value.value if isinstance(value, ast.Constant) else None for value in returned}
    return len(values) == 1 and None not in values


def unread_answers(case: Case) -> Iterator[Finding]:
    """`unread_answers`: flags that are the model's doing: no JSON where JSON was asked, an answer without the field."""
    graded = case.latest_graded
    flagged = [r for r in graded if r.grade and r.grade.all_errors and r.grade.failure is None]
    if len(graded) < MIN_GRADES or len(flagged) < FLAG_SHARE * len(graded):
        return
    flag, num = Counter(flag for r in flagged if r.grade for flag, _ in r.grade.all_errors).most_common(1)[0]
    yield Finding(
        check="unread_answers",
        title="the grader cannot read many answers",
        severity="medium",
        weight=len(flagged) / len(graded),
        evidence=f"{len(flagged)} of {len(graded)} grades carry a flag, {num} times {words(flag, 60)}",
        numbers={"flagged_share": len(flagged) / len(graded)},
        rollout_ids=ids_of(flagged),
        steps=case.steps,
        cure="show the form of the answer in the rows' system message, give it room (rollout.max_tokens_per_turn), or"
        " let the grader accept more forms",
    )


def noisy_judge(case: Case) -> Iterator[Finding]:
    """`noisy_judge`: the judge's own spread is as large as the difference between the rollouts of an item."""
    noise = mean(case.recent, "train/grader/judge_spread")
    spreads = [pstdev([score_of(rollout) for rollout in group]) for group in case.groups]
    inside = fmean(spreads) if spreads else 0.0
    if noise is None or not inside or noise < NOISE * inside:
        return
    yield Finding(
        check="noisy_judge",
        title="the judge's noise hides the differences between answers",
        severity="medium",
        weight=min(1.0, noise / inside) / 2,
        evidence=f"judgements of one answer spread by {noise:.3f}, the grades of one item's rollouts by {inside:.3f}",
        numbers={"judge_spread": noise, "spread_in_groups": inside},
        steps=case.steps,
        cure="ask the judge more often per answer, with a lower temperature or a finer rubric (grader)",
    )


def shadow_failures(case: Case) -> Iterator[Finding]:
    """`shadow_failures`: shadow graders that fail; nothing is trained on them."""
    num, graded = total(case.recent, "train/grader/shadow_errors"), total(case.recent, "train/num_graded")
    if not graded or num / graded < FAILURE_SHARE_HIGH:
        return
    failed = [r for r in case.graded if r.grade and r.grade.shadow_errors]
    error = next((text for r in failed if r.grade for text in r.grade.shadow_errors.values()), "see the rollouts")
    yield Finding(
        check="shadow_failures",
        title="a shadow grader fails",
        severity="low",
        weight=min(1.0, num / graded) / 2,
        evidence=f"{num:.0f} times on {graded:.0f} rollouts, for example: {words(error, _MAX_DETAIL)}",
        numbers={"share": num / graded},
        rollout_ids=ids_of(failed),
        steps=case.steps,
        cure="repair it or remove it from shadow_graders",
    )


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far grade and shadow grade parted within some steps, with the half-widths of the 95% intervals."""

    shadow: str
    rise: float
    rise_margin: float
    fall: float
    fall_margin: float

    @property
    def told(self) -> str:
        return (
            f"the grade rose by {self.rise:.3f} ± {self.rise_margin:.3f} in the last {DIVERGENCE_WINDOW} steps while"
            f" the shadow grade {words(self.shadow, 60)} fell by {self.fall:.3f} ± {self.fall_margin:.3f}"
        )


def shadow_divergence(rows: Sequence[Row]) -> Divergence | None:
    """Whether the grade rose while a shadow grade fell: what is optimised may not be what is wanted.

    Compares the last steps with as many before them; a change counts when it is larger than its 95% interval.
    """
    recent, older = rows[-DIVERGENCE_WINDOW:], rows[-2 * DIVERGENCE_WINDOW : -DIVERGENCE_WINDOW]
    if len(older) < DIVERGENCE_WINDOW:
        return None
    rise, margin = _change(older, recent, "train/grade")
    for name in sorted(key for key in recent[-1] if key.startswith("train/shadow/") and not key.endswith("_ci95")):
        change, change_margin = _change(older, recent, name)
        if rise > margin and -change > change_margin:
            return Divergence(name.removeprefix("train/shadow/"), rise, margin, -change, change_margin)
    return None


def _change(older: Sequence[Row], recent: Sequence[Row], name: str) -> tuple[float, float]:
    """Difference of two means of a measure, and the half-width of its 95% interval; (0, inf) where one is missing."""
    if any(len(numbers(part, name)) < len(part) for part in (older, recent)):
        return 0.0, math.inf
    change = fmean(numbers(recent, name)) - fmean(numbers(older, name))
    return change, math.hypot(interval(older, name), interval(recent, name))
