"""Groups -> tensors. A group is one packed row: the token trie of its rollouts in depth-first order.

Whatever the rollouts of a group have in common (the prompt, the same first turn, the same tool result) is computed
once; a token attends to its own ancestors and itself. The plain layout (one right-padded sequence per row) has the
same type and meaning and is the reference. Tokens that nothing with a loss depends on are left out of both.
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
from rft.types import Group

Layout = Literal["packed", "plain"]
Ints = NDArray[np.int64]


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

    ids: list[int]  # what the forward pass needs
    times: Ints  # [n] positions of the loss-bearing tokens in the sequence, >= 1; time t is predicted by input t - 1
    targets: list[int]
    logprobs: list[float]
    advantage: float
    rollout: int
    sequence: int


def build_micro_batches(
    groups: list[Group], advantages: list[Tensor], max_tokens: int, layout: Layout
) -> list[MicroBatch]:
    """One row per group (packed) or length-sorted padded rows (plain), each of at most `max_tokens` tokens.

    Their tokens have the weights of a window that is these micro-batches under `dapo`; see `weigh` for others.
    advantages: one [n_rollouts] float32 per group. A packed group beyond the limit is split by sequences into rows
    that repeat the shared prefix; a single sequence beyond it still gets its own row. Deterministic.
    """
    per_group = _paths(groups, advantages)
    if layout == "plain":
        found = _plain([path for paths in per_group for path in paths], max_tokens)
    else:
        found = [_pack(paths) for group in per_group for paths in _fit(group, max_tokens)]
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
    """Deal micro-batches to ranks, largest first to the rank with least work, then pad to equal counts.

    Work is the tokens a forward pass computes. A padding micro-batch carries no loss-bearing token: its gradient
    is exactly zero and the counts are unchanged, but every rank runs the same number of collectives.
    """
    ranks: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    work = [0] * num_ranks
    for micro_batch in sorted(micro_batches, key=lambda batch: -batch.num_row_tokens):  # stable: ties keep their order
        rank = work.index(min(work))
        ranks[rank].append(micro_batch)
        work[rank] += micro_batch.num_row_tokens
    longest = max(len(rank) for rank in ranks)
    return [rank + [_empty()] * (longest - len(rank)) for rank in ranks]


def _paths(groups: list[Group], advantages: list[Tensor]) -> list[list[_Path]]:
    """The trainable sequences of each group, in order; a sequence without sampled tokens has nothing to train."""
    result: list[list[_Path]] = []
    rollout_index, sequence_index = 0, 0
    for group, group_advantages in zip(groups, advantages, strict=True):
        paths: list[_Path] = []
        for rollout, advantage in zip(group.rollouts, group_advantages.tolist(), strict=True):
            for sequence in rollout.sequences:
                times = np.flatnonzero(np.asarray(sequence.mask))
                if times.size:
                    targets = [sequence.ids[time] for time in times]
                    logprobs = [sequence.logprobs[time] for time in times]
                    ids = sequence.ids[: times[-1]]
                    paths.append(_Path(ids, times, targets, logprobs, advantage, rollout_index, sequence_index))
                sequence_index += 1
            rollout_index += 1
        result.append(paths)
    return result


def _fit(paths: list[_Path], max_tokens: int) -> list[list[_Path]]:
    """Split one group's sequences so that each part's trie fits; neighbours in sorted order share most."""
    rows: list[list[int]] = []
    size, previous = 0, None
    for index in sorted(range(len(paths)), key=lambda i: paths[i].ids):
        ids = paths[index].ids
        added = len(ids) - (_common_prefix(previous, ids) if previous is not None else 0)
        if previous is None or size + added > max_tokens:
            rows.append([])
            size, added = 0, len(ids)
        rows[-1].append(index)
        size, previous = size + added, ids
    return [[paths[index] for index in sorted(row)] for row in rows]


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return int(np.argmax(np.asarray(first[:length]) != np.asarray(second[:length])))


def _pack(paths: list[_Path]) -> MicroBatch:
    """One row holding the trie of `paths`: in sorted order each path adds what its predecessor does not have."""
    row_of: dict[int, Ints] = {}  # path -> row position of each of its inputs
    ids: list[int] = []
    depths: list[Ints] = []
    subtree_end = np.zeros(sum(len(path.ids) for path in paths), dtype=np.int64)
    last, last_ids = np.zeros(0, dtype=np.int64), list[int]()
    for index in sorted(range(len(paths)), key=lambda i: paths[i].ids):
        path = paths[index]
        shared = _common_prefix(last_ids, path.ids)
        start, end = len(ids), len(ids) + len(path.ids) - shared
        subtree_end[last[shared:]] = start  # these tokens are no ancestors of what follows
        last, last_ids = np.concatenate([last[:shared], np.arange(start, end)]), path.ids
        ids += path.ids[shared:]
        depths.append(np.arange(shared, len(path.ids)))
        row_of[index] = last
    subtree_end[last] = len(ids)
    positions = [row_of[index][path.times - 1] for index, path in enumerate(paths)]
    return _micro_batch([ids], np.concatenate(depths)[None], subtree_end[None, : len(ids)], positions, paths)


def _plain(paths: list[_Path], max_tokens: int) -> list[MicroBatch]:
    """Right-padded rows, shortest first, so that rows of one micro-batch need little padding."""
    rows: list[list[int]] = []
    for index in sorted(range(len(paths)), key=lambda i: len(paths[i].ids)):
        if not rows or (len(rows[-1]) + 1) * len(paths[index].ids) > max_tokens:
            rows.append([])
        rows[-1].append(index)
    return [_pad([paths[index] for index in sorted(row)]) for row in rows]


def _pad(paths: list[_Path]) -> MicroBatch:
    width = max(len(path.ids) for path in paths)
    ids = [path.ids + [0] * (width - len(path.ids)) for path in paths]
    depths = np.tile(np.arange(width), (len(paths), 1))
    lengths = np.array([[len(path.ids)] for path in paths])
    subtree_end = np.where(depths < lengths, lengths, depths + 1)
    positions = [row * width + path.times - 1 for row, path in enumerate(paths)]
    return _micro_batch(ids, depths, subtree_end, positions, paths, "plain")


def _micro_batch(
    ids: list[list[int]],
    depths: Ints,
    subtree_end: Ints,
    positions: list[Ints],
    paths: list[_Path],
    layout: Layout = "packed",
) -> MicroBatch:
    predictors, predictor_index = np.unique(np.concatenate(positions), return_inverse=True)
    counts = torch.tensor([path.times.size for path in paths])
    return MicroBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.from_numpy(depths),
        subtree_end=torch.from_numpy(subtree_end),
        predictors=torch.from_numpy(predictors),
        predictor_index=torch.from_numpy(predictor_index),
        targets=torch.tensor([target for path in paths for target in path.targets]),
        sampled_logprobs=torch.tensor([value for path in paths for value in path.logprobs], dtype=torch.float32),
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
