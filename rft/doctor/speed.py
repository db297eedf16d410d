"""Why a run is slow: the phase, the tool, the grader, one rollout, places that are missing, evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rft.doctor.case import Case, ids_of, mean, numbers, total, words
from rft.doctor.finding import Finding
from rft.types import Rollout

PHASE = 0.75  # of a step: one phase dominates
MIN_STEP_S = 5.0  # nobody waits for less
SYNC = 0.3  # of a step: bringing weights over is not work
TOOL_SHARE, GRADER_SHARE = 0.5, 0.3  # of a rollout's seconds
STRAGGLER, STRAGGLER_SHARE = 3.0, 0.3  # times the median rollout, and of the step's sampling that it alone holds
FULL, SPARE = 0.9, 2.0  # of the engine's places were taken, and there were twice as many rollouts
EVALUATION = 0.4  # of all seconds

_CURES = {
    "sampling": "raise engine.max_concurrent and rollout.max_concurrent, shorten rollouts"
    " (rollout.max_tokens_per_turn), or set training.staleness=1 to sample beside training",
    "training": "raise training.max_tokens_per_micro_batch, set training.gradient_checkpointing=false if memory"
    " allows, or train on more devices (accelerate launch)",
    "sync": "on GPUs set training.sync=adapter, or transfer where all weights are trained; on CPU use a smaller model"
    " or more rollouts per step",
}


def slow_phase(case: Case) -> Iterator[Finding]:
    """`slow_phase`: what a step mostly does."""
    step_s = mean(case.recent, "time/step_s")
    if not step_s or step_s < MIN_STEP_S:
        return
    for phase, cure in _CURES.items():
        seconds = mean(case.recent, f"time/{phase}_s") or 0.0
        if seconds < (SYNC if phase == "sync" else PHASE) * step_s:
            continue
        yield Finding(
            check="slow_phase",
            title=f"most of a step is {phase}" if phase != "sync" else "the sync of weights takes long",
            severity="low",
            weight=min(1.0, seconds / step_s),
            evidence=f"{seconds:.1f} of {step_s:.1f} s per step",
            numbers={"seconds": seconds, "step_s": step_s},
            steps=case.steps,
            cure=cure,
        )


def slow_tools(case: Case) -> Iterator[Finding]:
    """`slow_tool`: rollouts mostly wait for tools."""
    waited, lasted = mean(case.recent, "train/tool_latency_s"), mean(case.recent, "train/duration_s")
    if not waited or not lasted or waited < TOOL_SHARE * lasted or lasted < 1.0:
        return
    names = {name for row in case.recent for name in row if name.startswith("train/tool_latency_s/")}
    each = {name: mean(case.recent, name) or 0.0 for name in names}
    worst = max(each, key=lambda name: each[name], default="")
    named = words(worst.removeprefix("train/tool_latency_s/"), 60) or "?"
    yield Finding(
        check="slow_tool",
        title=f"rollouts wait for tools, most for {named}",
        severity="medium",
        weight=min(1.0, waited / lasted),
        evidence=f"{waited:.1f} of {lasted:.1f} s per rollout; a call of {named} takes {each.get(worst, 0.0):.2f} s",
        numbers={"tool_s": waited, "rollout_s": lasted},
        rollout_ids=ids_of(sorted(case.graded, key=_tool_s, reverse=True)),
        steps=case.steps,
        cure="give the server more workers, raise environment.max_connections or the tool's rate_limit, or sample more"
        " rollouts at once (rollout.max_concurrent)",
    )


def _tool_s(rollout: Rollout) -> float:
    return sum(result.latency_s for turn in rollout.turns for result in turn.results)


def slow_grader(case: Case) -> Iterator[Finding]:
    """`slow_grader`: rollouts mostly wait for their grade."""
    waited, lasted = mean(case.recent, "train/grader/latency_s"), mean(case.recent, "train/duration_s")
    if not waited or not lasted or waited < GRADER_SHARE * lasted or lasted < 1.0:
        return
    yield Finding(
        check="slow_grader",
        title="rollouts wait for the grader",
        severity="medium",
        weight=min(1.0, waited / lasted),
        evidence=f"{waited:.1f} of {lasted:.1f} s per rollout",
        numbers={"grader_s": waited, "rollout_s": lasted},
        steps=case.steps,
        cure="judge with a smaller or a local model (judges), let the judge answer in fewer tokens, or keep grades"
        " (grader.cache)",
    )


def stragglers(case: Case) -> Iterator[Finding]:
    """`straggler`: one rollout of the newest step holds it up long after most have ended."""
    if not case.training:
        return
    last = case.training[-1]
    ended = [rollout for rollout in case.train if rollout.step == last["step"]]
    sampling = numbers([last], "time/sampling_s")
    if len(ended) < 4 or not sampling or sampling[0] < MIN_STEP_S:
        return
    ends = sorted(rollout.started_at + rollout.duration_s for rollout in ended)
    slowest = max(ended, key=lambda rollout: rollout.duration_s)
    usual, held_s = median(rollout.duration_s for rollout in ended), ends[-1] - ends[-2]
    if slowest.duration_s < STRAGGLER * usual or held_s < STRAGGLER_SHARE * sampling[0]:
        return
    yield Finding(
        check="straggler",
        title="one rollout holds up its step",
        severity="medium",
        weight=min(1.0, held_s / sampling[0]),
        evidence=f"in step {last['step']} all others had ended {held_s:.1f} s before it; it took"
        f" {slowest.duration_s:.1f} s, the usual one {usual:.1f} s",
        numbers={"held_s": held_s, "longest_s": slowest.duration_s, "median_s": usual},
        rollout_ids=[slowest.id],
        steps=(last["step"], last["step"]),
        cure="lower rollout.time_limit_s or rollout.max_tokens_per_turn, or set training.staleness=1: the next step is"
        " then sampled meanwhile",
    )


def few_places(case: Case) -> Iterator[Finding]:
    """`few_places`: rollouts queue for the engine, which could take more at once."""
    places = min(case.number("engine.max_concurrent", 64), case.number("rollout.max_concurrent", 512))
    num, lasted = mean(case.recent, "train/num_rollouts"), mean(case.recent, "train/duration_s")
    sampling_s, step_s = mean(case.recent, "time/sampling_s"), mean(case.recent, "time/step_s")
    if not (num and lasted and sampling_s and step_s) or step_s < MIN_STEP_S or sampling_s < step_s / 2:
        return
    at_once = num * lasted / sampling_s
    if num < SPARE * places or at_once < FULL * places:
        return
    yield Finding(
        check="few_places",
        title="rollouts wait for a place in the engine",
        severity="low",
        weight=min(1.0, sampling_s / step_s) / 2,
        evidence=f"{at_once:.0f} of {num:.0f} rollouts were sampled at once, engine.max_concurrent and"
        f" rollout.max_concurrent allow {places:.0f}",
        numbers={"at_once": at_once, "places": places},
        steps=case.steps,
        cure="raise engine.max_concurrent (and rollout.max_concurrent) as far as memory allows, or add engines",
    )


def slow_evaluation(case: Case) -> Iterator[Finding]:
    """`slow_evaluation`: evaluating takes a large part of the run."""
    evaluating, training = total(case.evaluations, "seconds"), total(case.training, "time/step_s")
    if len(case.training) < 4 or training < MIN_STEP_S or evaluating < EVALUATION * (evaluating + training):
        return
    yield Finding(
        check="slow_evaluation",
        title="evaluation takes a large part of the time",
        severity="low",
        weight=evaluating / (evaluating + training),
        evidence=f"{evaluating:.0f} s beside {training:.0f} s of training steps",
        numbers={"evaluation_s": evaluating, "training_s": training},
        cure="raise evaluation.every, lower evaluation.validation_items, evaluation.test_items or"
        " evaluation.rollouts_per_item",
    )
