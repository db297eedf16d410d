"""New weights to the engine, and the proof that they arrived.

`Sync.publish` writes the policy's weights as a folder an engine can load; it appears under its name complete or not
at all, and the last two stay. (`transfer` writes nothing: the engine takes the tensors.) `Sync.probe` compares engine
and trainer afterwards, in two ways, because one cannot see what the other does:
- The gap: both score the same sequences. Finds weights that are wrong by more than rounding (another model, a wrong
  merge, a stale output head, several lost syncs); one lost small step is below the rounding of bfloat16.
- The movement: both score one short sequence at every probe. An engine that computes the very same numbers for it
  as before the load, while the trainer's moved, did not take the new weights, however small the step was. (Measured
  on SmolLM2-135M in bfloat16: the gap is 0.04 to 0.06 with equal weights and the same with weights one step old.)
  This rests on the engine being deterministic for a single request; where it is not, only the gap remains.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rft.engines import Engine, PublishedWeights
from rft.engines.pool import EnginePool
from rft.errors import StorageError, SyncError

_NUM_KEPT = 2
_MAX_SCORED = 256  # tokens of a sequence that are compared: its last ones
_MAX_CANARY = 64  # tokens of the sequence whose scores are remembered
_MIN_MOVED = 1e-4  # mean |new - old| of the trainer's scores from which on the engine's must move too
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")  # config, tokenizer, template; never weights

Scorer = Callable[[list[int]], list[float]]  # ids -> log-probabilities of all but the first
DType = Literal["bfloat16", "float32"]
_MAX_MEAN_GAP: dict[DType, float] = {"float32": 2e-3, "bfloat16": 0.15}


class PublishedPolicy(Protocol):
    """What a sync needs of the policy."""

    def score(self, ids: list[int], start: int) -> list[float]: ...

    def full_state_dict(self) -> dict[str, Tensor]: ...

    def full_tensors(self) -> Generator[tuple[str, Tensor], None, None]: ...

    def save_weights(self, path: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """|engine - trainer| log-probability over the probed tokens, at temperature 1."""

    mean_gap: float
    max_gap: float


@dataclass(frozen=True, slots=True)
class _Scores:
    """What both said of one sequence at one policy version."""

    ids: list[int]
    engine: list[float]
    trainer: list[float]
    version: int


class Sync:
    """Publishes into `folder`. `base` is the model folder whose config and tokenizer files go with merged weights.

    kind: `adapter` publishes what `Policy.save_weights` writes, `merged` a whole model folder, `transfer` the tensors
    as they are when the engine loads them.
    dtype: the coarser of the engine's and the trainer's; it sets how large a gap is still rounding.
    """

    def __init__(
        self,
        kind: Literal["adapter", "merged", "transfer"],
        folder: Path,
        base: Path,
        dtype: DType = "bfloat16",
    ) -> None:
        self.kind = kind
        self._folder, self._base, self._dtype = folder, base, dtype
        self._canaries: dict[int, _Scores] = {}  # by engine

    def publish(self, policy: PublishedPolicy, version: int) -> PublishedWeights:
        """Write the weights as `folder/v000012`. Raises StorageError when the disk refuses."""
        if self.kind == "transfer":
            return PublishedWeights(version, self._base, "transfer", policy.full_tensors)
        write = policy.save_weights if self.kind == "adapter" else lambda path: self._write_merged(policy, path)
        path = self._folder / f"v{version:06d}"
        try:
            _replace(path, write)
            for old in sorted(self._folder.glob("v[0-9]*"))[:-_NUM_KEPT]:
                if old != path:
                    shutil.rmtree(old)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
            raise StorageError(
                f"weights cannot be written to {path}: {error}", cure="free disk space or change runs_dir"
            ) from error
        return PublishedWeights(version, path, self.kind)

    def clear(self) -> None:
        """Remove what was published: a finished run needs none of it, checkpoints hold the adapters."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write_merged(self, policy: PublishedPolicy, path: Path) -> None:
        path.mkdir()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.full_state_dict().items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        for pattern in _COPIED:
            for file in self._base.glob(pattern):
                if not file.name.endswith(".index.json"):  # names shards that are not here
                    shutil.copyfile(file, path / file.name)

    async def probe(self, policy: PublishedPolicy, engine: Engine, prompts: list[list[int]]) -> ProbeResult:
        """Compare engine and trainer on `prompts` (ids, each of at least two; long ones are cut to their end).

        Of several engines each is compared, all at once, and the largest gaps are returned; one that does not answer is
        left out. Raises SyncError naming version and gap when one does not compute with the trainer's weights.
        """
        limit = min(_MAX_SCORED, engine.max_model_len - 1)
        sequences = [ids[-limit:] for ids in prompts if len(ids) > 1]
        if not sequences:
            raise ValueError("a probe needs at least one sequence of two ids")
        trainer = _remembered(policy)
        if not isinstance(engine, EnginePool):
            return await self._probe_one(trainer, engine, sequences)
        results = await engine.each(lambda member: self._probe_one(trainer, member, sequences))
        return ProbeResult(max(result.mean_gap for result in results), max(result.max_gap for result in results))

    async def _probe_one(self, trainer: Scorer, engine: Engine, sequences: list[list[int]]) -> ProbeResult:
        scores = [await _score(trainer, engine, ids) for ids in sequences]
        gaps = [abs(a - b) for each in scores for a, b in zip(each.engine, each.trainer, strict=True)]
        result = ProbeResult(sum(gaps) / len(gaps), max(gaps))
        bound = _MAX_MEAN_GAP[self._dtype]
        if not result.mean_gap <= bound:  # so that NaN fails too
            raise SyncError(
                f"the engine does not compute with policy version {engine.policy_version}: log-probabilities differ"
                f" from the trainer's by {result.mean_gap:.3g} on average (limit {bound:g}, top {result.max_gap:.2g})",
                cure="check that the engine serves this model, in this dtype, without quantization",
            )
        before = self._canaries.get(id(engine))
        now = await _score(trainer, engine, before.ids if before else sequences[0][:_MAX_CANARY])
        self._canaries[id(engine)] = now
        if before is not None:
            _check_moved(before, now)
        return result


def _check_moved(before: _Scores, now: _Scores) -> None:
    moved = sum(abs(a - b) for a, b in zip(now.trainer, before.trainer, strict=True)) / len(now.trainer)
    if now.version != before.version and moved > _MIN_MOVED and now.engine == before.engine:
        raise SyncError(
            f"the engine still computes with policy version {before.version} instead of {now.version}: the trainer's"
            f" log-probabilities moved by {moved:.2g} on average, the engine's not at all",
            cure="see engine.log for the reload; a server given by engine.url must be vLLM 0.31 or later",
        )


async def _score(trainer: Scorer, engine: Engine, ids: list[int]) -> _Scores:
    return _Scores(ids, await engine.score(ids, 1), trainer(ids), engine.policy_version)


def _remembered(policy: PublishedPolicy) -> Scorer:
    """The trainer's scores of whole sequences, each computed once however many engines are compared with them."""
    known: dict[tuple[int, ...], list[float]] = {}

    def score(ids: list[int]) -> list[float]:
        key = tuple(ids)
        if key not in known:
            known[key] = policy.score(ids, 1)
        return known[key]

    return score


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a folder under a temporary name, then give it its own; one that was there before goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
