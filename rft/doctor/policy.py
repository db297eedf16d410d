"""What the optimizer's numbers say: log-probability gap, clipping, entropy, gradient, KL."""

from __future__ import annotations

from collections.abc import Iterator

from rft.doctor.case import Case, Row, mean, numbers, span
from rft.doctor.finding import Finding

GAP, GAP_HIGH = 0.05, 0.1  # nats: bfloat16 on both sides stays below 0.02, training.max_logprob_gap ends it at 0.2
GAP_GROWTH, GROWN_GAP = 5.0, 0.02  # drifts apart: this many times the first steps' gap, and more than bfloat16 makes
PROBE_GAP = 0.05  # nats, engine against trainer on the same weights
CLIPPED, CLIPPED_HIGH = 0.15, 0.4  # of the tokens; PPO's usual share is a few percent
ENTROPY_LEFT = 0.1  # of what it was: next to nothing is explored
ENTROPY_FLOOR = 0.02  # nats per token: one continuation only, whatever it was
ENTROPY_GROWTH, ENTROPY_RISE = 1.5, 0.5  # times and nats
SPIKE = 10.0  # times training.max_grad_norm, before clipping
SPIKE_SHARE = 0.2  # of the steps
SKIPPED_SHARE_HIGH = 0.1  # of the steps
REFERENCE_KL = 0.5  # nats per token away from the reference although the loss holds it back


def logprob_gap(case: Case) -> Iterator[Finding]:
    """`logprob_gap`: who sampled and who trains give the tokens different probabilities, or more and more so."""
    now, before = mean(case.recent, "logprob_gap/mean"), mean(case.early, "logprob_gap/mean")
    probe = mean(case.recent, "probe/mean") or 0.0
    if now is None or before is None:
        return
    drifts = now >= GROWN_GAP and now >= GAP_GROWTH * before
    if now < GAP and probe < PROBE_GAP and not drifts:
        return
    behind = mean(case.recent, "staleness/mean") or 0.0
    yield Finding(
        check="logprob_gap",
        title="engine and trainer " + ("drift apart" if drifts else "disagree about the tokens' probabilities"),
        severity="high" if max(now, probe) >= GAP_HIGH and behind < 1 else "medium",
        weight=min(1.0, max(now, probe) / GAP_HIGH / 2),
        evidence=f"mean difference of log-probabilities {now:.4f} now, {before:.4f} at first; {probe:.4f} in the probe"
        f" after each sync; the sampling weights are {behind:.1f} steps behind",
        numbers={"gap": now, "gap_at_first": before, "probe": probe, "staleness": behind},
        steps=case.steps,
        cure="lower training.staleness or training.learning_rate"
        if behind >= 0.5 and probe < PROBE_GAP
        else "check that the engine serves this model in this dtype: model.dtype=float32 on both sides, no quantisation"
        " in engine.args, training.sync=merged",
    )


def clipping(case: Case) -> Iterator[Finding]:
    """`clipping`: the loss ignores many tokens, because the policy moved far from the one that sampled."""
    share = mean(case.recent, "update/clip_share")
    if share is None or share < CLIPPED:
        return
    yield Finding(
        check="clipping",
        title="many tokens are clipped",
        severity="high" if share >= CLIPPED_HIGH else "medium",
        weight=share,
        evidence=f"{share:.0%} of the tokens now; mean ratio {mean(case.recent, 'update/mean_ratio') or 1.0:.3f}",
        numbers={"clip_share": share},
        steps=case.steps,
        cure="lower training.learning_rate or training.staleness; or let training.importance_cap weigh the tokens",
    )


def entropy(case: Case) -> Iterator[Finding]:
    """`entropy_collapse` and `entropy_rise`, against the first step."""
    rows = [row for row in case.training if numbers([row], "update/entropy")]
    if len(rows) < 2:
        return
    before, now = numbers(rows[:1], "update/entropy")[0], mean(rows[-case.window :], "update/entropy") or 0.0
    known = {"entropy": now, "entropy_at_first": before}
    told = f"{now:.3f} nats per sampled token now, {before:.3f} at the first step"
    if now < max(ENTROPY_LEFT * before, min(ENTROPY_FLOOR, before / 2)):
        has_gained = _has_gained(case)
        yield Finding(
            check="entropy_collapse",
            title="the policy explores no more: it says the same every time",
            severity="medium" if has_gained else "high",
            weight=0.4 if has_gained else 0.7,
            evidence=told + ("; the grade rose meanwhile, so it may simply be done" if has_gained else ""),
            numbers=known,
            steps=span(rows[-case.window :]),
            cure="lower training.learning_rate, raise training.entropy_coef (e.g. 0.01), training.clip_high or"
            " rollout.temperature; go on from an earlier checkpoint (--checkpoint)",
        )
    elif now > ENTROPY_GROWTH * before and now > before + ENTROPY_RISE:
        yield Finding(
            check="entropy_rise",
            title="the policy becomes random",
            severity="medium" if _has_gained(case) else "high",
            weight=0.5,
            evidence=told,
            numbers=known,
            steps=span(rows[-case.window :]),
            cure="lower training.learning_rate, set training.entropy_coef=0, and hold the policy back with"
            " training.kl_coef (e.g. 0.01)",
        )


def _has_gained(case: Case) -> bool:
    before, now = mean(case.training[:1], "train/grade"), mean(case.recent, "train/grade")
    return before is not None and now is not None and now > before


def gradient(case: Case) -> Iterator[Finding]:
    """`skipped_steps`: not finite, nothing changed. `gradient_spikes`: far above what it is clipped to."""
    updates = [row for row in case.training if "update/grad_norm" in row]
    skipped = [row for row in updates if row.get("update/is_skipped")]
    if skipped:
        share = len(skipped) / len(updates)
        yield Finding(
            check="skipped_steps",
            title="steps were skipped: loss or gradient were not finite",
            severity="high" if share >= SKIPPED_SHARE_HIGH else "medium",
            weight=share,
            evidence=f"{len(skipped)} of {len(updates)} updates",
            numbers={"share": share, "num": len(skipped)},
            steps=span(skipped),
            cure="lower training.learning_rate, set model.dtype=float32; the log names the rollouts",
        )
    limit = SPIKE * case.number("training.max_grad_norm", 1.0)
    spikes = [row for row in updates if any(norm >= limit for norm in numbers([row], "update/grad_norm"))]
    if spikes and len(spikes) >= SPIKE_SHARE * len(updates):
        yield Finding(
            check="gradient_spikes",
            title="the gradient is far above its limit",
            severity="medium",
            weight=min(1.0, len(spikes) / len(updates)) / 2,
            evidence=f"in {len(spikes)} of {len(updates)} updates it was at least {limit:g} before it was clipped, at"
            f" most {max(numbers(spikes, 'update/grad_norm')):.3g}",
            numbers={"share": len(spikes) / len(updates), "largest": max(numbers(spikes, "update/grad_norm"))},
            steps=span(spikes),
            cure="lower training.learning_rate; with training.advantage_scale=group tiny differences of grades become"
            " full advantages: try none",
        )


def reference_kl(case: Case) -> Iterator[Finding]:
    """`reference_kl`: far from the reference although training.kl_coef holds it."""
    now = mean(case.recent, "update/reference_kl")
    if now is None or now < REFERENCE_KL or not _is_held(case.recent, case):
        return
    yield Finding(
        check="reference_kl",
        title="the policy is far from its reference",
        severity="low",
        weight=min(1.0, now / 4),
        evidence=f"KL to the reference {now:.3f} nats per token with training.kl_coef"
        f" {case.number('training.kl_coef', 0.0):g}",
        numbers={"reference_kl": now},
        steps=case.steps,
        cure="raise training.kl_coef, or leave it if the rollouts read well",
    )


def _is_held(rows: list[Row], case: Case) -> bool:
    return bool(rows) and case.number("training.kl_coef", 0.0) > 0
