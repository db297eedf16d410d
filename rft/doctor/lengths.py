"""How long rollouts are: cut off by a limit, growing without a gain."""

from __future__ import annotations

from collections.abc import Iterator

from rft.doctor.case import Case, ids_of, interval, mean
from rft.doctor.finding import Finding
from rft.doctor.groups import USELESS_SHARE, useless_share
from rft.types import StopReason

TRUNCATED, TRUNCATED_HIGH = 0.3, 0.7  # of the rollouts now
GROWTH = 2.0  # times the first steps'
MIN_TOKENS = 16.0  # growth of less is no length
EMPTY = 0.3  # of the answers

_LIMITS = {
    StopReason.MAX_TOKENS: ("the limit of tokens", "rollout.max_tokens_per_turn (or max_tokens_per_rollout)"),
    StopReason.MAX_TURNS: ("the limit of turns", "rollout.max_turns (or max_episode_steps)"),
    StopReason.TIME_LIMIT: ("the limit of time", "rollout.time_limit_s"),
}
_MEASURES = {  # measure -> check, words, cure
    "sampled_tokens": ("length_growth", "rollouts grow longer", "training.costs.sampled_tokens, e.g. 0.1"),
    "turns": ("turn_growth", "rollouts take more turns", "training.costs.tool_calls, or rollout.max_turns"),
    "reasoning_tokens": ("reasoning_growth", "reasoning grows longer", "training.costs.reasoning_tokens, e.g. 0.1"),
}


def truncated(case: Case) -> Iterator[Finding]:
    """`truncated_by_tokens`, `..._by_turns`, `..._by_time`. No disaster while groups still teach."""
    useless = useless_share(case) or 0.0
    for reason, (words, keys) in _LIMITS.items():
        name = f"train/stop/{reason}"
        now = sum(row.get(name) or 0.0 for row in case.recent) / max(1, len(case.recent))
        if now < TRUNCATED:
            continue
        cut = [rollout for rollout in case.latest if rollout.stop_reason == reason]
        yield Finding(
            check=f"truncated_by_{'time' if reason == StopReason.TIME_LIMIT else reason.value.removeprefix('max_')}",
            title=f"rollouts are cut off by {words}",
            severity="high" if now >= TRUNCATED_HIGH and useless >= USELESS_SHARE else "medium",
            weight=now,
            evidence=f"{now:.0%} of the rollouts now, {mean(case.training[:1], name) or 0.0:.0%} at the first step",
            numbers={"share": now},
            rollout_ids=ids_of(cut),
            steps=case.steps,
            cure=f"raise {keys}; or pay less for them: rollout.truncated_grade=0 and rollout.last_turn_message",
        )


def growth(case: Case) -> Iterator[Finding]:
    """`length_growth`, `turn_growth`, `reasoning_growth`: twice as long as at first, and what the grade did."""
    gain = (mean(case.recent, "train/grade") or 0.0) - (mean(case.early, "train/grade") or 0.0)
    is_gain = gain > interval(case.recent, "train/grade")
    for measure, (check, words, key) in _MEASURES.items():
        name = f"train/{measure}"
        before, now = mean(case.early, name), mean(case.recent, name)
        least = MIN_TOKENS if "tokens" in measure else 1.0
        if before is None or now is None or now < GROWTH * before or now - before < least:
            continue
        yield Finding(
            check=check,
            title=words + ("" if is_gain else ", and the grade does not rise with them"),
            severity="low" if is_gain else "medium",
            weight=min(1.0, now / max(before, 1.0) / 10),
            evidence=f"{before:.1f} at first, {now:.1f} now; the grade changed by {gain:+.3f}",
            numbers={"before": before, "now": now, "grade_change": gain},
            rollout_ids=ids_of(sorted(case.latest_graded, key=lambda rollout: -rollout.num_sampled_tokens)),
            steps=case.steps,
            cure=f"set {key}",
        )


def empty_answers(case: Case) -> Iterator[Finding]:
    """`empty_answers`: the last message has no text."""
    now = mean(case.recent, "train/unresponsive_share")
    if now is None or now < EMPTY:
        return
    yield Finding(
        check="empty_answers",
        title="many answers are empty",
        severity="medium",
        weight=now,
        evidence=f"{now:.0%} of the rollouts end without a text",
        numbers={"share": now},
        rollout_ids=ids_of(rollout for rollout in case.latest_graded if not rollout.output_text.strip()),
        steps=case.steps,
        cure="ask for a final answer in the rows or by rollout.last_turn_message; with a thinking model raise"
        " rollout.max_tokens_per_turn",
    )
