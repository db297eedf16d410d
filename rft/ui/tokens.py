"""The tokens of a rollout as they are trained: text, log-probability, whether they count, and the advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rft.errors import UserError
from rft.ui.detokenizing import texts_of
from rft.ui.record import RolloutRow, decoded
from rft.ui.schema import RolloutLine, Token, Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_STD_EPSILON = 1e-4  # trainers/objective.py


@dataclass(slots=True)
class _Sequence:
    """One training sequence, as rft.types.Rollout.sequences: a new one starts with every fork."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)  # None: not sampled


def tokens_of(
    row: RolloutRow, group: Sequence[RolloutLine], config: dict[str, Any], load: Callable[[], Tokenizer], window: slice
) -> Tokens:
    """The tokens inside `window` of all sequences laid end to end. load: raises UserError without a tokenizer."""
    sequences, problem = _sequences(row), None
    texts: list[str] = []
    try:
        tokenizer = load()
        texts = [text for sequence in sequences for text in texts_of(tokenizer, sequence.ids)]
    except UserError as error:
        problem = str(error)
    ids = [token_id for sequence in sequences for token_id in sequence.ids]
    logprobs = [logprob for sequence in sequences for logprob in sequence.logprobs]
    is_used = row.split == "train" and row.grade is not None
    starts = [sum(len(sequence.ids) for sequence in sequences[:index]) for index in range(len(sequences))]
    return Tokens(
        tokens=[
            Token(
                text=texts[index] if texts else "",
                id=ids[index],
                logprob=logprobs[index],
                is_trained=is_used and logprobs[index] is not None,
            )
            for index in range(len(ids))[window]
        ],
        num_tokens=len(ids),
        sequence_starts=starts,
        advantage=advantage(row, group, config),
        problem=problem,
    )


def _sequences(row: RolloutRow) -> list[_Sequence]:
    sequences: list[_Sequence] = []
    for turn in row.turns:
        if turn.is_fork or not sequences:
            sequences.append(_Sequence())
        given, sampled, logprobs = decoded(turn.input_ids), decoded(turn.output_ids), decoded(turn.logprobs)
        known = [*logprobs[: len(sampled)], *[0.0] * (len(sampled) - len(logprobs))]
        sequences[-1].ids += [*given, *sampled]
        sequences[-1].logprobs += [*[None] * len(given), *[0.0 if value is None else value for value in known]]
    return sequences


def advantage(row: RolloutRow, group: Sequence[RolloutLine], config: dict[str, Any]) -> float | None:
    """As trainers/objective.py takes it from the grades of a group; None where more than the grades decided.

    That is: no training, costs, groups sampled in rounds (training.allocation), a group that is not all there.
    """
    training = config.get("training")
    if not isinstance(training, dict) or row.split != "train" or row.grade is None or row.grade.score is None:
        return None
    costs = training.get("costs") or {}
    has_costs = isinstance(costs, dict) and any(value for name, value in costs.items() if name != "above")
    scores = [line.grade for line in group if line.grade is not None]
    if has_costs or training.get("allocation", "uniform") != "uniform" or row.grade.score not in scores:
        return None
    if len(set(scores)) < 2:
        return 0.0
    found = row.grade.score - fmean(scores)
    if training.get("baseline") == "leave_one_out":
        found *= len(scores) / (len(scores) - 1)
    return found / (stdev(scores) + _STD_EPSILON) if training.get("advantage_scale") == "group" else found
