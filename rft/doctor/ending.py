"""How a run ended, where that was not well: by an error, or without a word."""

from __future__ import annotations

from collections.abc import Iterator

from rft.doctor.case import Case, words
from rft.doctor.finding import Finding

_MAX_ERROR = 400  # characters

# of the texts with which a run ends (rft/collect.py, rft/envs, trainers): what kind of cause they name
_KINDS = {
    "run_failed_by_tools": ("tool_failed", "environment.outage_limit_s", "environment.tools"),
    "run_failed_by_grader": ("the grader failed", "grader_failed", "a grade must be"),
    "run_failed_by_numbers": ("not finite", "engine and trainer disagree", "log-probabilit"),
}
_TITLES = {
    "run_failed_by_tools": "the tools ended the run",
    "run_failed_by_grader": "the grader ended the run",
    "run_failed_by_numbers": "the training's numbers ended the run",
    "run_failed": "the run failed",
}
_CURES = {
    "run_failed_by_tools": "repair the tool's server, then `rft train CONFIG --resume`; environment.outage_limit_s and"
    " rollout.max_discarded_share say how much a run bears",
    "run_failed_by_grader": "repair the grader (`rft grade run` tries it on one answer), then `rft train CONFIG"
    " --resume`; rollout.max_failed_grade_share says how much a run bears",
    "run_failed_by_numbers": "lower training.learning_rate, set model.dtype=float32, and start anew or from an earlier"
    " checkpoint (--checkpoint)",
    "run_failed": "do what the error says, then `rft train CONFIG --resume`",
}


def ending(case: Case) -> Iterator[Finding]:
    """`run_failed...` and `run_killed`."""
    step = int(case.state.get("step") or 0)
    if case.status == "failed":
        error = str(case.state.get("error") or "it did not say why")
        kind = error_kind(error)
        yield Finding(
            check=kind,
            title=_TITLES[kind],
            severity="high",
            weight=1.0,
            evidence=f"after step {step}: {words(error, _MAX_ERROR)}",
            steps=(step, step),
            cure=_CURES[kind],
        )
    elif case.status == "killed":
        yield Finding(
            check="run_killed",
            title="the process of the run is gone",
            severity="high",
            weight=1.0,
            evidence=f"its state says it runs, and no process writes it; the last finished step is {step}",
            steps=(step, step),
            cure="look for the cause outside (memory: `dmesg`, a closed terminal), then `rft train CONFIG --resume`;"
            " where memory ran out lower training.max_tokens_per_micro_batch or engine.gpu_memory_share",
        )


def error_kind(error: str) -> str:
    return next((kind for kind, words in _KINDS.items() if any(word in error for word in words)), "run_failed")
