"""Numbers of rollouts broken down: per part of a multi grader, per judge model, per tool. For rows of rft/metrics.py.

A key ends with the name it is about, which may hold anything. Only tools that an item has are named: a model can make
up any number of others, they are counted together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from rft.types import Grade, Group, Rollout, TokenUsage


def breakdown(groups: Sequence[Group]) -> dict[str, float]:
    """Tokens in all (of the prompt: each once, also where later turns read it again), and the three breakdowns."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    grades = [rollout.grade for rollout in rollouts if rollout.grade is not None]
    return {
        "num_graded": len(grades),
        "num_sampled_tokens": sum(rollout.num_sampled_tokens for rollout in rollouts),
        "num_prompt_tokens": sum(rollout.num_prompt_tokens for rollout in rollouts),
        "num_reasoning_tokens": sum(num_reasoning_tokens(rollout) for rollout in rollouts),
        "unresponsive_share": fmean([float(not rollout.output_text.strip()) for rollout in rollouts] or [0.0]),
        **_parts(grades),
        **_judges(grades),
        **_tools(groups),
    }


def num_reasoning_tokens(rollout: Rollout) -> int:
    return sum(turn.reasoning_tokens for turn in rollout.turns)


def _parts(grades: Sequence[Grade]) -> dict[str, float]:
    """`part_num/key` grades of a part, their mean seconds, their judges' tokens, and `part_error/key/flag` counts."""
    row: dict[str, float] = {}
    for key in sorted({key for grade in grades for key in grade.parts}):
        parts = [grade.parts[key] for grade in grades if key in grade.parts]
        used = _total(parts)
        row[f"part_num/{key}"] = len(parts)
        row[f"part_latency_s/{key}"] = fmean(part.latency_s for part in parts)
        row[f"part_prompt_tokens/{key}"] = used.prompt_tokens
        row[f"part_completion_tokens/{key}"] = used.completion_tokens
        flags = Counter(flag for part in parts for flag, _ in part.all_errors)
        row |= {f"part_error/{key}/{flag}": float(count) for flag, count in sorted(flags.items())}
    return row


def _total(grades: Sequence[Grade]) -> TokenUsage:
    return sum((used for grade in grades for used in grade.all_usage.values()), TokenUsage())


def _judges(grades: Sequence[Grade]) -> dict[str, float]:
    """`judge_num/model` grades that a model took part in, and its tokens."""
    total: dict[str, TokenUsage] = {}
    num: Counter[str] = Counter()
    for grade in grades:
        for model, used in grade.all_usage.items():
            total[model] = total.get(model, TokenUsage()) + used
            num[model] += 1
    row: dict[str, float] = {}
    for model, used in sorted(total.items()):
        row[f"judge_num/{model}"] = num[model]
        row[f"judge_prompt_tokens/{model}"] = used.prompt_tokens
        row[f"judge_completion_tokens/{model}"] = used.completion_tokens
        row[f"judge_cached_tokens/{model}"] = used.cached_tokens
    return row


def _tools(groups: Sequence[Group]) -> dict[str, float]:
    """`tool_num/name` calls, how many of them failed, their mean seconds; tokens that an answer put into the prompt."""
    calls, errors, seconds = Counter[str](), Counter[str](), dict[str, float]()
    num_unknown = num_answer_tokens = num_answers = 0
    for group in groups:
        known = set(group.item.tool_names)
        for rollout in group.rollouts:
            for call, result in rollout.tool_calls:
                if call.name not in known:
                    num_unknown += 1
                    continue
                calls[call.name] += 1
                errors[call.name] += call.error is not None or result is None or result.is_error
                latency_s = result.latency_s if result is not None else 0.0
                seconds[call.name] = seconds.get(call.name, 0.0) + latency_s
            num, tokens = _answers(rollout)
            num_answers, num_answer_tokens = num_answers + num, num_answer_tokens + tokens
    if not calls and not num_unknown:
        return {}
    row: dict[str, float] = {"unknown_tool_calls": num_unknown}
    row["tool_answer_tokens"] = num_answer_tokens / num_answers if num_answers else 0.0
    for name in sorted(calls):
        row[f"tool_num/{name}"], row[f"tool_errors/{name}"] = calls[name], errors[name]
        row[f"tool_latency_s/{name}"] = seconds[name] / calls[name]
    return row


def _answers(rollout: Rollout) -> tuple[int, int]:
    """How many answers of tools went into a prompt, and the tokens they took there, the template's included.

    Where a fork renders the whole history again, or a chat API does, what was added is not known: such answers are
    left out.
    """
    num = tokens = 0
    for before, turn in zip(rollout.turns, rollout.turns[1:], strict=False):
        if before.results and not turn.is_fork and turn.usage is None:
            num, tokens = num + len(before.results), tokens + len(turn.input_ids)
    return num, tokens
