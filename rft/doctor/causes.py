"""Which findings are consequences of which, so that the cause comes first and its signs do not stand beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rft.doctor.finding import Finding, Severity

_RANK: dict[Severity, int] = {"high": 0, "medium": 1, "low": 2}

_GROUPS = ("groups_all_fail", "groups_all_succeed", "groups_stuck", "few_rollouts")
_GRADE = ("grade_fell", "grade_flat", "train_validation_gap")
_ENTROPY = ("entropy_collapse", "entropy_rise")
_SLOW = ("slow_phase", "slow_tool", "slow_grader", "straggler", "few_places")
_LENGTHS = ("truncated_by_tokens", "truncated_by_turns", "length_growth", "turn_growth", "reasoning_growth")
_CALLS = ("malformed_calls", "unknown_tools", "unused_tools", "empty_answers")

# cause -> its consequences; the first cause that is found takes them. What ended a run comes before all else
_EXPLAINS: dict[str, tuple[str, ...]] = {
    "dead_tool": (
        *("run_failed_by_tools", "refused_calls", "truncated_by_time", "unused_tools", "learning_rate"),
        *(*_GROUPS, *_GRADE, *_SLOW, *_LENGTHS, "reward_hacking"),
    ),
    "grader_failures": ("run_failed_by_grader", "discarded_by_grader", "constant_grader", *_GROUPS, *_GRADE),
    "discarded_by_grader": ("run_failed_by_grader",),
    "constant_grader": (*_GROUPS, *_GRADE, *_LENGTHS, "reward_hacking", "unread_answers", "entropy_collapse"),
    "learning_rate": (
        *("run_failed_by_numbers", "skipped_steps", "gradient_spikes", "logprob_gap", "clipping", "reference_kl"),
        *(*_GROUPS, *_GRADE, *_ENTROPY, *_LENGTHS, *_CALLS, "unread_answers", "reward_hacking", "refused_calls"),
    ),
    "reward_hacking": (*_GROUPS, *_GRADE, *_LENGTHS, "entropy_collapse", "unused_tools"),
    "skipped_steps": ("run_failed_by_numbers",),
    "logprob_gap": ("run_failed_by_numbers", "clipping", "grade_fell"),
    "refused_calls": ("groups_all_fail", "groups_stuck", "grade_flat", "grade_fell"),
    "malformed_calls": ("groups_all_fail", "groups_stuck", "grade_flat", "grade_fell"),
    "unknown_tools": ("groups_all_fail", "groups_stuck", "grade_flat", "grade_fell"),
    "truncated_by_tokens": ("groups_all_fail", "groups_stuck", "empty_answers", "grade_flat", "grade_fell"),
    "truncated_by_turns": ("groups_all_fail", "groups_stuck", "empty_answers", "grade_flat", "grade_fell"),
    "truncated_by_time": ("groups_all_fail", "groups_stuck", "empty_answers", "grade_flat", "grade_fell"),
    "unread_answers": ("groups_all_fail", "grade_flat"),
    "entropy_collapse": ("groups_stuck", "groups_all_succeed", "groups_all_fail", "few_rollouts", "grade_flat"),
    "entropy_rise": ("groups_all_fail", "grade_fell", "truncated_by_tokens", "length_growth"),
    "groups_all_fail": ("grade_flat", "few_rollouts"),
    "groups_all_succeed": ("grade_flat", "few_rollouts"),
    "groups_stuck": ("grade_flat", "few_rollouts"),
    "grade_fell": ("grade_flat",),
    "slow_tool": ("slow_phase", "straggler"),
    "slow_grader": ("slow_phase",),
    "straggler": ("slow_phase",),
    "few_places": ("slow_phase",),
}


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """The worst first, consequences as a sentence of their cause. A mild cause explains no severe consequence."""
    left = list(findings)
    for cause, consequences in _EXPLAINS.items():
        found = next((finding for finding in left if finding.check == cause), None)
        if found is None:
            continue
        taken = [f for f in left if f.check in consequences and _RANK[f.severity] >= _RANK[found.severity]]
        if taken:
            left = [_with(found, taken) if f is found else f for f in left if f not in taken]
    return sorted(left, key=lambda finding: (_RANK[finding.severity], -finding.weight, finding.check))


def _with(cause: Finding, taken: Sequence[Finding]) -> Finding:
    titles = "; ".join(dict.fromkeys(finding.title for finding in taken))
    return cause.model_copy(update={"evidence": f"{cause.evidence}. It also explains: {titles}"})
