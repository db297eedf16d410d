"""The processes that train together: who leads, how a call reaches all of them, how gradients become one.

Rank 0 tells the story; the others wait for calls and run the same method of their own policy. Whatever is collective
(a step, a gather, a forward pass through sharded weights) goes through `join`, so ranks cannot take different
branches: no collective depends on what a rollout contains. Calls travel over gloo: a rank that waits for a step's
sampling does not spin on its GPU.

Replicated parameters have their gradients summed once a step, over all of them, used or not (an expert may get no
token on one rank). DistributedDataParallel would reduce inside the last backward pass, and its ranks would part ways
where one of them runs out of memory or leaves a parameter unused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from rft.errors import ConfigError

if TYPE_CHECKING:
    from rft.trainers.policy import Policy

_TIMEOUT = timedelta(hours=2)  # ranks without an engine wait for a whole step's sampling
_BUCKET_BYTES = 64 * 2**20


def build_accelerator(seed: int) -> Accelerator:
    """What `accelerate launch` or a plain start made of this process; seeds Python's, NumPy's and torch's generators.

    Mixed precision stays off: `model.dtype` and `model.master_dtype` decide. Raises ConfigError when the launch asks
    for what rft would ignore.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        cure = "set mixed_precision: 'no' in the launch's config file; model.dtype and model.master_dtype decide"
        raise ConfigError("the launch asks for mixed precision", where="mixed_precision", cure=cure)
    set_seed(seed)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)])
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:  # each would train alone and write into the same folder
        cure = "without GPUs launch with ACCELERATE_USE_CPU=true and OMP_NUM_THREADS=1, or use one process"
        raise ConfigError(f"{asked} processes were launched that do not form a group", where="num_processes", cure=cure)
    return accelerator


class Ranks:
    """The ranks of one training. With one process everything here is a no-op."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.num: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.device: torch.device = accelerator.device
        self._calls = dist.new_group(backend="gloo", timeout=_TIMEOUT) if self.num > 1 else None
        self._is_joined = self._is_broken = False

    @property
    def leads(self) -> bool:
        return self.index == 0

    # --- calls ---

    @contextmanager
    def join(self, method: str, *args: Any) -> Iterator[None]:
        """On rank 0: the other ranks run `policy.method(*args)` while the block runs. Elsewhere, and inside another
        `join`: nothing. `args` are pickled.
        """
        if self.num == 1 or not self.leads or self._is_joined:
            yield
            return
        self._is_joined = True
        self._say((method, args))
        try:
            yield
        except BaseException:
            self._is_broken = True  # the others are somewhere inside the call: no further one would reach them
            raise
        finally:
            self._is_joined = False

    def follow(self, policy: Policy) -> None:
        """On the other ranks: run what rank 0 calls until it is done with us."""
        while (call := self._hear()) is not None:
            method, args = call
            getattr(policy, method)(*args)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around all that rank 0 does: lets the other ranks go at its end, also when it fails between two calls."""
        try:
            yield
        finally:
            if self.num > 1 and not self._is_broken:
                self._say(None)

    def _say(self, call: tuple[str, Sequence[Any]] | None) -> None:
        dist.broadcast_object_list([call], src=0, group=self._calls)

    def _hear(self) -> tuple[str, Sequence[Any]] | None:
        box: list[tuple[str, Sequence[Any]] | None] = [None]
        dist.broadcast_object_list(box, src=0, group=self._calls)
        return box[0]

    # --- sums ---

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every gradient the sum over ranks; one that is missing counts as zero. Sharded ones are that already."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.num == 1:
            return
        whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        for bucket in _buckets(whole):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(summed)

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, value: bool) -> bool:
        """True on all ranks when it is on one."""
        return self.max([float(value)])[0] > 0

    def union(self, values: set[int]) -> set[int]:
        """What any rank has, on all of them."""
        if self.num == 1:
            return values
        found: list[set[int]] = [set()] * self.num
        dist.all_gather_object(found, values, group=self._calls)
        return set().union(*found)

    def _reduced(self, values: list[float], how: Any) -> list[float]:
        if self.num == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self._calls)
        result: list[float] = tensor.tolist()
        return result


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most `_BUCKET_BYTES` unless one alone is larger."""
    for _, same in groupby(gradients, key=lambda gradient: gradient.dtype):
        bucket: list[Tensor] = []
        size = 0
        for gradient in same:
            if bucket and size + gradient.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket
