"""The checks, in one list, and what they say of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rft.doctor import collapse, ending, graders, groups, hacking, lengths, policy, speed, tools
from rft.doctor.case import Case, read_case
from rft.doctor.causes import ranked
from rft.doctor.finding import Diagnosis, Finding
from rft.store import RunStore

Check = Callable[[Case], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    ending.ending,
    tools.dead_tools,
    tools.refused_calls,
    tools.bad_calls,
    tools.unused_tools,
    tools.discarded,
    graders.grader_failures,
    graders.constant_grader,
    graders.unread_answers,
    graders.noisy_judge,
    graders.shadow_failures,
    groups.useless_groups,
    groups.few_rollouts,
    groups.stale_groups,
    collapse.learning_rate,
    collapse.grade_fell,
    collapse.grade_flat,
    collapse.train_validation_gap,
    policy.logprob_gap,
    policy.clipping,
    policy.entropy,
    policy.gradient,
    policy.reference_kl,
    hacking.reward_hacking,
    lengths.truncated,
    lengths.growth,
    lengths.empty_answers,
    speed.slow_phase,
    speed.slow_tools,
    speed.slow_grader,
    speed.stragglers,
    speed.few_places,
    speed.slow_evaluation,
)


def diagnose(store: RunStore) -> Diagnosis:
    """What is wrong with the run in a folder, the worst first; of a run that is written, as far as it went.

    Raises nothing for what cannot be read: `problems` names it.
    """
    return examine(read_case(store))


def examine(case: Case, checks: Iterable[Check] = CHECKS) -> Diagnosis:
    """The same of evidence that has been read."""
    checks = list(checks)
    findings = [finding for check in checks for finding in check(case)]
    return Diagnosis(
        run_id=case.run_id,
        findings=ranked(findings),
        num_steps=len(case.training),
        checks=[check.__name__ for check in checks],
        problems=case.problems,
    )
