"""The charts of a run: which numbers of rft/metrics.py, rft/breakdown.py and rft/percentiles.py each shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_INTERVAL = "The band is the 95% interval over items."
_BAND = "The line is the median, the band goes from the 10th to the 90th percentile"


@dataclass(frozen=True, slots=True)
class Line:
    """`name`: of a number. One that ends with `/`: every number whose name starts so, a line each; the rest of its
    name is said behind `label`. `{}` in it stands for p10, p50 and p90: the median with a band.
    """

    name: str
    label: str = ""
    over: str = ""  # the number it is divided by
    is_complement: bool = False  # 1 - share is drawn


@dataclass(frozen=True, slots=True)
class Plan:
    """One chart. `rows`: rollouts of every split, of training alone, or the rows of training steps or of a warm-up."""

    id: str
    title: str
    unit: str
    help: str
    lines: tuple[Line, ...]
    rows: Literal["all", "train", "step", "warmup"] = "all"
    kind: Literal["lines", "stacked"] = "lines"
    hides_zero: bool = False  # leaves out lines that are 0 throughout


PLANS = (
    Plan("grade", "Grade", "", f"Validation tells whether it generalises. {_INTERVAL}", (Line("grade", "grade"),)),
    Plan("parts", "Parts of the grade", "", "Mean score of each part of a multi grader.", (Line("part/"),)),
    Plan(
        "shadow",
        "Shadow grades",
        "",
        "Logged, never optimised: when they fall while the grade rises, the grader is gamed.",
        (Line("shadow/"),),
    ),
    Plan(
        "useful_groups",
        "Useful groups",
        "share",
        "Groups whose grades differ; the others teach nothing.",
        (Line("groups/no_signal", "useful", over="groups/total", is_complement=True),),
        rows="step",
    ),
    Plan(
        "valid_calls",
        "Rollouts with a valid call",
        "share",
        f"At least one call that its tool accepted. {_INTERVAL}",
        (Line("valid_call_share", "valid call"),),
    ),
    Plan("tool_calls", "Tool calls per rollout", "calls", f"Mean. {_INTERVAL}", (Line("tool_calls", "all tools"),)),
    Plan(
        "tool_calls_spread",
        "Tool calls per rollout, distribution",
        "calls",
        f"{_BAND} of the rollouts.",
        (Line("tool_calls_{}", "all tools"),),
    ),
    Plan(
        "calls_by_tool",
        "Tool calls per rollout by tool",
        "calls",
        "Mean over all rollouts of a step.",
        (Line("tool_num/", over="num_rollouts"),),
    ),
    Plan(
        "calls_by_tool_spread",
        "Tool calls per rollout by tool, distribution",
        "calls",
        f"{_BAND} of the rollouts.",
        (Line("tool_calls_{}/"),),
    ),
    Plan("turns", "Turns per rollout", "turns", f"Mean. {_INTERVAL}", (Line("turns", "turns"),)),
    Plan(
        "completion_tokens",
        "Completion tokens per rollout",
        "tokens",
        f"All sampled tokens, mean. {_INTERVAL}",
        (Line("sampled_tokens", "completion"),),
    ),
    Plan(
        "completion_tokens_spread",
        "Completion tokens per rollout, distribution",
        "tokens",
        f"{_BAND} of the rollouts.",
        (Line("sampled_tokens_{}", "completion"),),
    ),
    Plan(
        "reasoning_tokens",
        "Reasoning tokens per rollout",
        "tokens",
        f"Those inside <think>, mean. {_INTERVAL}",
        (Line("reasoning_tokens", "reasoning"),),
    ),
    Plan(
        "reasoning_tokens_spread",
        "Reasoning tokens per rollout, distribution",
        "tokens",
        f"{_BAND} of the rollouts.",
        (Line("reasoning_tokens_{}", "reasoning"),),
    ),
    Plan(
        "latency",
        "Seconds per rollout, distribution",
        "s",
        f"{_BAND} of the rollouts.",
        (Line("duration_s_{}", "rollout"),),
    ),
    Plan(
        "latency_mean",
        "Seconds per rollout",
        "s",
        f"Mean. {_INTERVAL}",
        (Line("duration_s", "rollout"), Line("tool_latency_s", "of it, tools")),
    ),
    Plan("tool_latency", "Seconds per tool call", "s", f"{_BAND} of the calls.", (Line("tool_call_s_{}/"),)),
    Plan(
        "errors",
        "Errors by kind",
        "per step",
        "Counts; what never happened is left out.",
        (
            Line("num_discarded", "discarded rollouts"),
            Line("unknown_tool_calls", "calls of unknown tools"),
            Line("tool_errors/", "failed calls of"),
            Line("grader_errors", "grades with an error"),
            Line("grader_error/", "grader:"),
            Line("grader/shadow_errors", "failed shadow grades"),
        ),
        hides_zero=True,
    ),
    Plan(
        "stops",
        "Why rollouts ended",
        "share",
        "Of the rollouts of a training step; discarded ones are replaced.",
        (Line("stop/"),),
        rows="train",
        kind="stacked",
    ),
    Plan(
        "phases",
        "Seconds per phase",
        "s",
        "What a step's time went into.",
        (Line("time/sampling_s", "sampling"), Line("time/training_s", "training"), Line("time/sync_s", "sync")),
        rows="step",
        kind="stacked",
    ),
    Plan(
        "entropy",
        "Entropy",
        "nats",
        "Of the sampled distributions; near 0 the policy has stopped exploring.",
        (Line("update/entropy", "entropy"),),
        rows="step",
    ),
    Plan("loss", "Loss", "", "Its level says little, a jump a lot.", (Line("update/loss", "loss"),), rows="step"),
    Plan("grad_norm", "Gradient norm", "", "Before clipping.", (Line("update/grad_norm", "norm"),), rows="step"),
    Plan(
        "clip_share",
        "Clipped tokens",
        "share",
        "Tokens whose gradient the clip removed.",
        (Line("update/clip_share", "clipped"),),
        rows="step",
    ),
    Plan(
        "kl",
        "KL divergence",
        "nats",
        "How far the policy is from who sampled, and from the reference model.",
        (Line("update/approx_kl", "to the sampler"), Line("update/reference_kl", "to the reference")),
        rows="step",
    ),
    Plan(
        "logprob_gap",
        "Log-probability gap",
        "nats",
        "Mean absolute difference; it should stay near 0.",
        (Line("logprob_gap/mean", "engine and trainer"), Line("probe/mean", "probe after sync")),
        rows="step",
    ),
    Plan(
        "staleness",
        "Staleness",
        "steps",
        "How far the sampling weights were behind.",
        (Line("staleness/mean", "mean"), Line("staleness/max", "max")),
        rows="step",
    ),
    Plan(
        "learning_rate",
        "Learning rate",
        "",
        "As the schedule set it.",
        (Line("update/learning_rate", "learning rate"),),
        rows="step",
    ),
    Plan(
        "warmup_loss",
        "Loss of the warm-up",
        "nats",
        "Per token of the demonstrations.",
        (Line("update/loss", "training"), Line("held_out/loss", "held out")),
        rows="warmup",
    ),
)
