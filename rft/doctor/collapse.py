"""The grade fell, does not move, or moves only in training; and the cause of a sudden fall, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rft.doctor.case import Case, Row, ids_of, interval, mean, numbers, span
from rft.doctor.finding import Finding
from rft.types import Rollout

FALL = 0.5  # of the best grade: more than noise and forgetting
FLAT_STEPS = 8  # before that nobody expects a change
JUMP = 0.4  # of the rollouts: a share that changes by so much within one step
FALLEN_CALLS = 0.25  # of what the share of valid calls was
ENTROPY_JUMP = 3.0  # times up or down from one step to the next
LOGPROB_JUMP = 0.5  # nats per token, from the first step's rollouts to those of now
SPIKE = 10.0  # times the first gradient, and above training.max_grad_norm
USUAL_LORA, USUAL_FULL = 2e-3, 1e-4  # what published runs do not go beyond
GAP = 0.2  # of the grade: training above validation

_SHARES = {  # of the rollouts, and what it means when it jumps up
    "train/stop/max_tokens": "truncated rollouts",
    "train/stop/max_turns": "rollouts that met the limit of turns",
    "train/unresponsive_share": "empty answers",
}


@dataclass(frozen=True, slots=True)
class Fall:
    """From the best steps to now."""

    best: list[Row]
    before: float
    now: float


def fall(case: Case) -> Fall | None:
    """The grade now is at most half of what it was at best, beyond both 95% intervals.

    At best: of the first two steps, which were sampled before a learning rate could break anything, or of as many
    later steps as are looked at now. The best single one of many steps would be one with easy items.
    """
    rows = [row for row in case.training if numbers([row], "train/grade")]
    recent = [row for row in case.recent if numbers([row], "train/grade")]
    before = rows[: len(rows) - len(recent)]
    if not recent or not before:
        return None
    size, stride = len(recent), max(1, len(recent) // 2)
    parts = [[row] for row in before[:2]]
    parts += [before[i : i + size] for i in range(0, len(before) - size + 1, stride)]
    best = max(parts, key=lambda part: _grade(part) - interval(part, "train/grade"))
    width = interval(best, "train/grade") + interval(recent, "train/grade")
    has_fallen = _grade(recent) + width < _grade(best) and _grade(recent) <= FALL * _grade(best)
    return Fall(best, _grade(best), _grade(recent)) if has_fallen else None


def _grade(rows: list[Row]) -> float:
    return fmean(numbers(rows, "train/grade"))


def learning_rate(case: Case) -> Iterator[Finding]:
    """`learning_rate`: the policy broke: grades fell (or never were) and its numbers jumped from a step to the next."""
    fallen, signs = fall(case), _signs(case)
    if len(signs) < (1 if fallen else 2) or _has_risen(case):
        return
    rate = case.number("training.learning_rate", 0.0)
    usual = USUAL_LORA if case.setting("model.lora") is not None else USUAL_FULL
    told = f"the grade fell from {fallen.before:.3f} to {fallen.now:.3f}; " if fallen else ""
    unusual = f"; training.learning_rate {rate:g} is above what is usual ({usual:g})" if rate > usual else ""
    steps = span([*fallen.best, *case.recent]) if fallen else span(case.training)
    yield Finding(
        check="learning_rate",
        title="the policy broke: the learning rate is too high",
        severity="high",
        weight=1.0,
        evidence=told + "; ".join(signs) + unusual,
        numbers={"learning_rate": rate, "num_signs": len(signs)},
        rollout_ids=ids_of(case.latest_graded),
        steps=steps,
        cure=f"divide training.learning_rate ({rate:g}) by 10 and start anew or from a checkpoint before the fall"
        " (--checkpoint); training.warmup_steps and a lower training.max_grad_norm help at the start",
    )


def _signs(case: Case) -> list[str]:
    """What else jumped, each as a phrase with its numbers."""
    found = [*_share_jumps(case), *_entropy_jumps(case), *_logprob_jump(case)]
    norms = numbers(case.training, "update/grad_norm")
    if len(norms) > 1 and max(norms) >= max(SPIKE * norms[0], case.number("training.max_grad_norm", 1.0)):
        found.append(f"the gradient's norm went from {norms[0]:.3g} to {max(norms):.3g}")
    gap, first_gap = mean(case.recent, "logprob_gap/mean"), mean(case.training[:1], "logprob_gap/mean")
    if gap is not None and first_gap is not None and gap > max(10 * first_gap, 0.02):
        found.append(f"the log-probability gap went from {first_gap:.4f} to {gap:.4f}")
    if num := sum(bool(row.get("update/is_skipped")) for row in case.training):
        found.append(f"{num} updates were not finite")
    return found


def _share_jumps(case: Case) -> Iterator[str]:
    for name, words in _SHARES.items():
        shares = [(row["step"], row.get(name) or 0.0) for row in case.training]
        for (_, before), (step, after) in pairwise(shares):
            if after - before >= JUMP and (mean(case.recent, name) or 0.0) - before >= JUMP:
                yield f"{words} jumped from {before:.0%} to {after:.0%} at step {step}"
                break
    calls = mean(case.training[:1], "train/valid_call_share"), mean(case.recent, "train/valid_call_share")
    if calls[0] and calls[1] is not None and calls[1] <= FALLEN_CALLS * calls[0]:
        yield f"rollouts with a valid call fell from {calls[0]:.0%} to {calls[1]:.0%}"


def _entropy_jumps(case: Case) -> Iterator[str]:
    rows = [row for row in case.training if (row.get("update/entropy") or 0.0) > 0]
    for before, after in pairwise(rows):
        old, new = before["update/entropy"], after["update/entropy"]
        if new >= ENTROPY_JUMP * old or new <= old / ENTROPY_JUMP:
            yield f"the entropy jumped from {old:.3f} to {new:.3f} nats at step {after['step']}"
            return


def _logprob_jump(case: Case) -> Iterator[str]:
    """Of what was sampled: rows have no entropy of a step that trained nothing."""
    old, new = _mean_logprob(case.first), _mean_logprob(case.latest)
    if old is None or new is None or case.first[0].step == case.latest[0].step:
        return
    if abs(old - new) >= LOGPROB_JUMP:
        yield f"the mean log-probability of sampled tokens went from {old:.2f} to {new:.2f}"


def _mean_logprob(rollouts: list[Rollout]) -> float | None:
    means = [fmean(turn.logprobs) for rollout in rollouts for turn in rollout.turns if turn.logprobs]
    return fmean(means) if means else None


def _has_risen(case: Case) -> bool:
    """Whether the grade is now above the first step's, beyond both 95% intervals."""
    first, now = case.training[:1], mean(case.recent, "train/grade")
    before = mean(first, "train/grade")
    if before is None or now is None:
        return False
    return now - interval(case.recent, "train/grade") > before + interval(first, "train/grade")


def grade_fell(case: Case) -> Iterator[Finding]:
    """`grade_fell`: a symptom, for when no check names the cause."""
    found = fall(case)
    if found is None:
        return
    yield Finding(
        check="grade_fell",
        title="the grade fell",
        severity="high",
        weight=min(1.0, (found.before - found.now) / max(abs(found.before), 1e-9)),
        evidence=f"from {found.before:.3f} at step {found.best[0]['step']} to {found.now:.3f} in the last"
        f" {len(case.recent)} steps",
        numbers={"before": found.before, "now": found.now},
        rollout_ids=ids_of(sorted(case.latest_graded, key=lambda r: r.grade.score if r.grade else 0.0)),
        steps=span([*found.best, *case.recent]),
        cure="read rollouts of now beside those of the best step; lower training.learning_rate, set training.kl_coef"
        " (e.g. 0.01), and go on from the best checkpoint (`rft train --init-from`)",
    )


def grade_flat(case: Case) -> Iterator[Finding]:
    """`grade_flat`: a symptom too: the last steps' grade is that of the first ones."""
    rows = [row for row in case.training if numbers([row], "train/grade")]
    if len(rows) < FLAT_STEPS:
        return
    early, recent = rows[: case.window], rows[-case.window :]
    before, now = fmean(numbers(early, "train/grade")), fmean(numbers(recent, "train/grade"))
    margin = (interval(early, "train/grade") ** 2 + interval(recent, "train/grade") ** 2) ** 0.5
    if not math.isfinite(margin) or abs(now - before) > margin or before >= 1 - GAP / 2:
        return
    yield Finding(
        check="grade_flat",
        title="the grade does not move",
        severity="low",
        weight=0.3,
        evidence=f"{before:.3f} in the first {len(early)} steps, {now:.3f} in the last {len(recent)}; changes below"
        f" {margin:.3f} cannot be told from chance",
        numbers={"before": before, "now": now, "margin": margin},
        steps=span(rows),
        cure="train longer, raise training.learning_rate by 2 or 3, training.items_per_step or training.base_rollouts",
    )


def train_validation_gap(case: Case) -> Iterator[Finding]:
    """`train_validation_gap`: training grades rose, those of validation items did not follow."""
    rows = [row for row in case.evaluations if row.get("split") == "validation" and numbers([row], "grade")]
    rows.sort(key=lambda row: row.get("step") or 0)
    if len(rows) < 2 or rows[-1].get("step") == rows[0].get("step") or not case.training:
        return
    at_end = [row for row in case.training if row["step"] <= rows[-1]["step"]][-case.window :]
    first = case.training[:1]
    before, now = mean(first, "train/grade"), mean(at_end, "train/grade")
    if before is None or now is None:
        return
    rise, other_rise = now - before, rows[-1]["grade"] - rows[0]["grade"]
    margin = sum(interval([row], "grade") ** 2 for row in (rows[0], rows[-1]))
    margin = (margin + interval(first, "train/grade") ** 2 + interval(at_end, "train/grade") ** 2) ** 0.5
    if rise - other_rise < max(GAP, margin):
        return
    yield Finding(
        check="train_validation_gap",
        title="the model learns the training items by heart",
        severity="medium",
        weight=min(1.0, rise - other_rise),
        evidence=f"the training grade rose by {rise:.3f} to {now:.3f}, that of validation by {other_rise:.3f} to"
        f" {rows[-1]['grade']:.3f}",
        numbers={"train_rise": rise, "validation_rise": other_rise, "margin": margin},
        steps=span(case.training),
        cure="use more rows in data.train, fewer training.steps, a lower training.learning_rate or training.kl_coef;"
        " keep the best checkpoint (training.keep_best)",
    )
