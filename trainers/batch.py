"""Groups -> tensors. A packed row is the token trie of training sequences, of several groups, in depth-first order.

Whatever sequences of a row have in common at their start (the instructions, the prompt, the same first turn and tool
result) is computed once; a token attends to its own ancestors and itself. Sequences that start differently stand
beside each other: a forest. The plain layout (one right-padded sequence per row) has the same type and meaning and is
the reference. Tokens that nothing with a loss depends on are left out of both. `packing` says what goes where.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rft.trainers.objective import Loss, token_weights
from rft.trainers.packing import Ints, common_prefix, deal, lexicographic, plan_rows
from rft.types import Group, Sequence

Layout = Literal["packed", "plain"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass computes: B rows of T tokens and the N loss-bearing tokens they predict.

    A loss-bearing token is one sampled id of one rollout: rollouts that share a trie node keep one entry each,
    because each has its own advantage. They are ordered by (sequence, time), in every layout.
    """

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64, counted along the token's own path
    subtree_end: Tensor  # [B, T] int64, end (exclusive) of the token's descendants in the depth-first order
    predictors: Tensor  # [P] int64, unique flat positions in B*T whose hidden state predicts a target
    predictor_index: Tensor  # [N] int64, into predictors
    targets: Tensor  # [N] int64, the sampled ids
    sampled_logprobs: Tensor  # [N] float32, natural logs at the sampling temperature, as the engine gave them
    advantages: Tensor  # [N] float32
    weights: Tensor  # [N] float32, of each token in the loss of the whole optimizer window
    rollout_index: Tensor  # [N] int64, counts the rollouts of all groups given, in order
    sequence_index: Tensor  # [N] int64, counts their training sequences (a rollout has several when it forks)
    layout: Layout

    @property
    def num_tokens(self) -> int:
        """The loss-bearing tokens."""
        return self.targets.numel()

    @property
    def num_row_tokens(self) -> int:
        """The tokens a forward pass computes, padding included: B * T."""
        return self.input_ids.numel()

    @property
    def attention_mask(self) -> Tensor:
        """[B, 1, T, T] bool, True where the query (dim 2) may attend to the key (dim 3): ancestors and itself."""
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        is_earlier = position[None, :, None] >= position[None, None, :]
        is_inside = position[None, :, None] < self.subtree_end[:, None, :]
        return (is_earlier & is_inside)[:, None]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "layout"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, slots=True)
class _Path:
    """One training sequence, cut before its last loss-bearing token: `ids` are inputs, `times` what they predict."""

    ids: Ints  # what the forward pass needs
    times: Ints  # [n] positions of the loss-bearing tokens in the sequence, >= 1; time t is predicted by input t - 1
    targets: Ints  # [n]
    logprobs: NDArray[np.float32]  # [n]
    advantage: float
    rollout: int
    sequence: int


def build_micro_batches(
    groups: list[Group], advantages: list[Tensor], max_tokens: int, layout: Layout, num_ranks: int = 1
) -> list[MicroBatch]:
    """Packed rows of several groups, or length-sorted padded rows (plain), each of at most `max_tokens` tokens.

    Their tokens have the weights of a window that is these micro-batches under `dapo`; see `weigh` for others.
    advantages: one [n_rollouts] float32 per group. Rows are cut between sequences where least is shared, and repeat
    what is; a single sequence beyond the limit still gets its own row. num_ranks: among how many the packed rows
    will be dealt, see `packing.plan_rows`. Deterministic.
    """
    paths = _paths(groups, advantages)
    if layout == "plain":
        found = _plain(paths, max_tokens)
    else:
        rows = plan_rows([path.ids for path in paths], max_tokens, num_ranks)
        found = [_pack([paths[index] for index in row]) for row in rows]
    return weigh(found, "dapo", 1)


def count_tokens(micro_batches: Iterable[MicroBatch]) -> int:
    """The loss-bearing tokens of all micro-batches: the normaliser of an optimizer window."""
    return sum(micro_batch.num_tokens for micro_batch in micro_batches)


def weigh(micro_batches: list[MicroBatch], loss: Loss, max_length: int) -> list[MicroBatch]:
    """The same micro-batches with the weights their tokens have in the window that they are together."""
    if not micro_batches:
        return []
    rollouts = torch.cat([micro_batch.rollout_index for micro_batch in micro_batches])
    sequences = torch.cat([micro_batch.sequence_index for micro_batch in micro_batches])
    weights = token_weights(loss, rollouts, sequences, max_length)
    parts = weights.split([micro_batch.num_tokens for micro_batch in micro_batches])
    return [replace(micro_batch, weights=part) for micro_batch, part in zip(micro_batches, parts, strict=True)]


def split_over_ranks(micro_batches: list[MicroBatch], num_ranks: int) -> list[list[MicroBatch]]:
    """Deal micro-batches to ranks by the tokens they compute, largest first, and pad to equal counts.

    A padding micro-batch carries no loss-bearing token: its gradient is exactly zero and the counts are unchanged,
    but every rank runs the same number of collectives. `build_micro_batches` for as many ranks needs none, unless
    there are fewer sequences than ranks.
    """
    dealt = deal([micro_batch.num_row_tokens for micro_batch in micro_batches], num_ranks)
    ranks = [[micro_batches[index] for index in rank] for rank in dealt]
    longest = max(len(rank) for rank in ranks)
    return [rank + [_empty()] * (longest - len(rank)) for rank in ranks]


def _paths(groups: list[Group], advantages: list[Tensor]) -> list[_Path]:
    """The trainable sequences of all groups, in order; a sequence without sampled tokens has nothing to train."""
    rollouts = [
        found
        for group, values in zip(groups, advantages, strict=True)
        for found in zip(group.rollouts, values.tolist(), strict=True)
    ]
    sequences = (
        (sequence, advantage, index)
        for index, (rollout, advantage) in enumerate(rollouts)
        for sequence in rollout.sequences
    )
    found = [_path(*given, index) for index, given in enumerate(sequences)]
    return [path for path in found if path.times.size]


def _path(sequence: Sequence, advantage: float, rollout: int, index: int) -> _Path:
    ids, times = np.asarray(sequence.ids, dtype=np.int64), np.flatnonzero(np.asarray(sequence.mask, dtype=bool))
    logprobs = np.asarray(sequence.logprobs, dtype=np.float32)[times]
    return _Path(ids[: times[-1]] if times.size else ids, times, ids[times], logprobs, advantage, rollout, index)


def _pack(paths: list[_Path]) -> MicroBatch:
    """One row holding the trie of `paths`: in sorted order each path adds what its predecessor does not have."""
    row_of = [np.zeros(0, dtype=np.int64)] * len(paths)  # the row position of each input of each path
    ids: list[Ints] = []
    depths: list[Ints] = []
    subtree_end = np.zeros(sum(path.ids.size for path in paths), dtype=np.int64)
    last, last_ids, end = row_of[0], row_of[0], 0
    for index in lexicographic([path.ids for path in paths]):
        path = paths[index].ids
        shared = common_prefix(last_ids, path)
        subtree_end[last[shared:]] = end  # these tokens are no ancestors of what follows
        start, end = end, end + path.size - shared
        last, last_ids = np.concatenate([last[:shared], np.arange(start, end)]), path
        ids.append(path[shared:])
        depths.append(np.arange(shared, path.size))
        row_of[index] = last
    subtree_end[last] = end
    positions = [row[path.times - 1] for row, path in zip(row_of, paths, strict=True)]
    return _micro_batch(
        np.concatenate(ids)[None], np.concatenate(depths)[None], subtree_end[None, :end], positions, paths
    )


def _plain(paths: list[_Path], max_tokens: int) -> list[MicroBatch]:
    """Right-padded rows, shortest first, so that rows of one micro-batch need little padding."""
    rows: list[list[int]] = []
    for index in sorted(range(len(paths)), key=lambda i: paths[i].ids.size):
        if not rows or (len(rows[-1]) + 1) * paths[index].ids.size > max_tokens:
            rows.append([])
        rows[-1].append(index)
    return [_pad([paths[index] for index in sorted(row)]) for row in rows]


def _pad(paths: list[_Path]) -> MicroBatch:
    width = max(path.ids.size for path in paths)
    ids = np.stack([np.pad(path.ids, (0, width - path.ids.size)) for path in paths])
    depths = np.tile(np.arange(width), (len(paths), 1))
    lengths = np.array([[path.ids.size] for path in paths])
    subtree_end = np.where(depths < lengths, lengths, depths + 1)
    positions = [row * width + path.times - 1 for row, path in enumerate(paths)]
    return _micro_batch(ids, depths, subtree_end, positions, paths, "plain")


def _micro_batch(
    ids: Ints,
    depths: Ints,
    subtree_end: Ints,
    positions: list[Ints],
    paths: list[_Path],
    layout: Layout = "packed",
) -> MicroBatch:
    predictors, predictor_index = np.unique(np.concatenate(positions), return_inverse=True)
    counts = torch.tensor([path.times.size for path in paths])
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(depths),
        subtree_end=torch.from_numpy(subtree_end),
        predictors=torch.from_numpy(predictors),
        predictor_index=torch.from_numpy(predictor_index),
        targets=torch.from_numpy(np.concatenate([path.targets for path in paths])),
        sampled_logprobs=torch.from_numpy(np.concatenate([path.logprobs for path in paths])),
        advantages=torch.tensor([path.advantage for path in paths], dtype=torch.float32).repeat_interleave(counts),
        weights=torch.zeros(int(counts.sum())),
        rollout_index=torch.tensor([path.rollout for path in paths]).repeat_interleave(counts),
        sequence_index=torch.tensor([path.sequence for path in paths]).repeat_interleave(counts),
        layout=layout,
    )


def one_path(ids: list[int], start: int, layout: Layout = "plain") -> MicroBatch:
    """One sequence and its targets `ids[start:]`, 1 <= start <= len(ids), without sampled values: to be scored only."""
    path, length = torch.tensor(ids), len(ids)
    targets = path[start:]
    index, zeros = torch.arange(targets.numel()), torch.zeros(targets.numel())
    return MicroBatch(
        input_ids=path[None],
        position_ids=torch.arange(length)[None],
        subtree_end=torch.full((1, length), length),
        predictors=torch.arange(start - 1, length - 1),
        predictor_index=index,
        targets=targets,
        sampled_logprobs=zeros,
        advantages=zeros,
        weights=zeros,
        rollout_index=index,
        sequence_index=index,
        layout=layout,
    )


def _empty() -> MicroBatch:
    """Two tokens without loss: something to run where a rank has nothing left."""
    return one_path([0, 0], 2, "packed")
