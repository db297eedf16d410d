"""What to do when memory runs out: tell that it did, free what is left over, cut micro-batches in two."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
from torch import Tensor

from rft.trainers.batch import MicroBatch


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for what torch raises where a GPU's memory, or the machine's (a limit of the system), is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give back what a failed pass left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halve(micro_batch: MicroBatch) -> list[MicroBatch]:
    """Two micro-batches with half of the sequences each, together the same loss and gradient; one that has a single
    sequence stays as it is.
    """
    sequences = micro_batch.sequence_index.unique()
    if sequences.numel() < 2:
        return [micro_batch]
    return [_part(micro_batch, half) for half in sequences.tensor_split(2)]


def _part(micro_batch: MicroBatch, sequences: Tensor) -> MicroBatch:
    is_kept = torch.isin(micro_batch.sequence_index, sequences)
    positions = micro_batch.predictors[micro_batch.predictor_index[is_kept]]
    cut = _rows if micro_batch.layout == "plain" else _ancestors
    part, positions = cut(micro_batch, positions)
    predictors, predictor_index = torch.unique(positions, return_inverse=True)
    return replace(
        part,
        predictors=predictors,
        predictor_index=predictor_index,
        targets=micro_batch.targets[is_kept],
        sampled_logprobs=micro_batch.sampled_logprobs[is_kept],
        advantages=micro_batch.advantages[is_kept],
        weights=micro_batch.weights[is_kept],
        rollout_index=micro_batch.rollout_index[is_kept],
        sequence_index=micro_batch.sequence_index[is_kept],
    )


def _rows(micro_batch: MicroBatch, positions: Tensor) -> tuple[MicroBatch, Tensor]:
    """The padded rows that `positions` (flat, [n] int64) are in, and where they are then."""
    width = micro_batch.input_ids.shape[1]
    rows, row_index = torch.unique(positions // width, return_inverse=True)
    needed = int((positions % width).max()) + 1
    part = replace(
        micro_batch,
        input_ids=micro_batch.input_ids[rows, :needed],
        position_ids=micro_batch.position_ids[rows, :needed],
        subtree_end=micro_batch.subtree_end[rows, :needed].clamp(max=needed),
    )
    return part, row_index * needed + positions % width


def _ancestors(micro_batch: MicroBatch, positions: Tensor) -> tuple[MicroBatch, Tensor]:
    """The tokens of a packed row that `positions` ([n] int64) attend to, and where `positions` are then."""
    ends = micro_batch.subtree_end[0]
    before = _counts_before(torch.zeros_like(ends).index_fill_(0, positions, 1))
    is_needed = before[ends] > before[:-1]  # one of the positions is below the token, or is it
    places = _counts_before(is_needed.long())
    part = replace(
        micro_batch,
        input_ids=micro_batch.input_ids[:, is_needed],
        position_ids=micro_batch.position_ids[:, is_needed],
        subtree_end=places[ends[is_needed]][None],
    )
    return part, places[positions]


def _counts_before(flags: Tensor) -> Tensor:
    """[T] int64 of 0 and 1 -> [T + 1]: how many ones come before each place."""
    return torch.cat([flags.new_zeros(1), flags.cumsum(0)])
