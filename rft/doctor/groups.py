"""Groups that teach nothing: all rollouts of an item have one grade. Why: all fail, all succeed, or stuck between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from rft.doctor.case import Case, ids_of, mean, numbers, score_of, total
from rft.doctor.finding import Finding
from rft.types import Rollout

Kind = Literal["fail", "succeed", "stuck"]

USELESS_SHARE = 0.5  # half of the sampling is for nothing
USELESS_SHARE_HIGH = 0.9  # there is practically no gradient
MIN_GROUPS = 2  # groups in the sample before their kind is told
EDGE = 0.05  # of the scale: what still counts as its end
FEW_ROLLOUTS = 6  # with p = 0.25, 6 rollouts of an item are equal with 18%, 3 with 44%
STALE_SHARE = 0.1  # of the groups: sampled twice

_TITLES: dict[Kind, str] = {
    "fail": "all rollouts of most items fail",
    "succeed": "all rollouts of most items succeed",
    "stuck": "all rollouts of most items get the same grade, neither failing nor full",
}
_CURES: dict[Kind, str] = {
    "fail": "make the task easier or pay for parts of it in the grader, warm the model up (`rft warmup`), raise"
    " training.base_rollouts or rollout.temperature; if right answers get this grade too (`rft grade run`), repair the"
    " grader",
    "succeed": "the model can do this: stop here, use harder items in data.train, or set training.allocation=adaptive",
    "stuck": "the model says the same every time, or the grader tells too little apart: raise rollout.temperature or"
    " training.entropy_coef, lower training.learning_rate, and give finer grades",
}


def useless_groups(case: Case) -> Iterator[Finding]:
    """`groups_all_fail`, `groups_all_succeed`, `groups_stuck`: most groups of the last steps carry no signal."""
    share = useless_share(case)
    if share is None or share < USELESS_SHARE:
        return
    useless = [group for group in case.groups if is_flat(group)]
    kind, num = _most(case, useless)
    flat = [group[0] for group in useless if kind_of(group[0], scale(case)) == kind]
    grades = Counter(round(score_of(rollout), 3) for rollout in flat)
    most = ", ".join(f"{grade:g} in {times}" for grade, times in grades.most_common(3))
    yield Finding(
        check={"fail": "groups_all_fail", "succeed": "groups_all_succeed", "stuck": "groups_stuck"}[kind],
        title=_TITLES[kind],
        severity=_severity(kind, share),
        weight=share,
        evidence=f"{share:.0%} of the groups of the last {len(case.recent)} steps carry no signal; of {len(useless)}"
        f" such groups that were looked at {num} {'are stuck' if kind == 'stuck' else kind}"
        + (f" (grade {most} groups)" if most else ""),
        numbers={"useless_share": share, "num_looked_at": len(useless), "num_of_kind": num},
        rollout_ids=ids_of(flat),
        steps=case.steps,
        cure=_CURES[kind],
    )


def _severity(kind: Kind, share: float) -> Literal["high", "medium"]:
    """That everything succeeds is no illness, whatever it costs."""
    return "high" if share >= USELESS_SHARE_HIGH and kind != "succeed" else "medium"


def _most(case: Case, useless: Sequence[list[Rollout]]) -> tuple[Kind, int]:
    """The most frequent kind; without any rollout what the mean grade suggests."""
    low, high = scale(case)
    if not useless:
        grade = mean(case.recent, "train/grade") or 0.0
        is_low, is_high = grade <= low + EDGE * (high - low), grade >= high - EDGE * (high - low)
        return ("fail" if is_low else "succeed" if is_high else "stuck"), 0
    return Counter(kind_of(group[0], (low, high)) for group in useless).most_common(1)[0]


def useless_share(case: Case) -> float | None:
    """Of the groups of the last steps, those without signal; None when there were none."""
    num = total(case.recent, "groups/total")
    return total(case.recent, "groups/no_signal") / num if num else None


def is_flat(group: Sequence[Rollout]) -> bool:
    return len({score_of(rollout) for rollout in group}) == 1


def scale(case: Case) -> tuple[float, float]:
    """The lowest and the highest grade there is: 0 and 1, or what was seen beyond them."""
    scores = [score_of(rollout) for rollout in [*case.graded, *case.first]]
    return min([0.0, *scores]), max([1.0, *scores])


def kind_of(rollout: Rollout, between: tuple[float, float]) -> Kind:
    low, high = between
    score, edge = score_of(rollout), EDGE * (high - low)
    return "fail" if score <= low + edge else "succeed" if score >= high - edge else "stuck"


def few_rollouts(case: Case) -> Iterator[Finding]:
    """`few_rollouts`: items do vary, but groups are so small that many show one grade by chance."""
    share = useless_share(case)
    num_groups = total(case.recent, "groups/total")
    if share is None or share < USELESS_SHARE / 2 or not num_groups:
        return
    size = total(case.recent, "budget/rollouts") / num_groups
    kinds = Counter(kind_of(group[0], scale(case)) for group in case.groups if is_flat(group))
    if size == 0 or size >= FEW_ROLLOUTS or not (kinds["fail"] and kinds["succeed"]):
        return
    yield Finding(
        check="few_rollouts",
        title="too few rollouts per item",
        severity="medium",
        weight=share / 2,
        evidence=f"{size:.1f} rollouts per item; {share:.0%} of the groups carry no signal, of those looked at"
        f" {kinds['fail']} fail and {kinds['succeed']} succeed: many would vary with more rollouts",
        numbers={"rollouts_per_item": size, "useless_share": share},
        steps=case.steps,
        cure="raise training.base_rollouts (or training.compute_multiplier), with fewer training.items_per_step where"
        " time is short; or set training.allocation=adaptive",
    )


def stale_groups(case: Case) -> Iterator[Finding]:
    """`stale_groups`: sampled ahead, too old when their turn came, and sampled anew."""
    num_stale, num = total(case.training, "groups/stale"), total(case.training, "groups/total")
    if not num or num_stale / num < STALE_SHARE:
        return
    behind = max(numbers(case.training, "staleness/max"), default=0.0)
    yield Finding(
        check="stale_groups",
        title="groups get too old and are sampled twice",
        severity="medium",
        weight=min(1.0, num_stale / num),
        evidence=f"{num_stale:.0f} of {num:.0f} groups were sampled anew; the oldest tokens that were trained are"
        f" {behind:.0f} steps behind",
        numbers={"stale_share": num_stale / num, "staleness_max": behind},
        steps=case.steps,
        cure="raise training.staleness by one, or shorten the slowest rollouts (rollout.time_limit_s)",
    )
