"""Engines sample tokens from the policy. One file per engine, `build_engine` picks it.

Token ids in, token ids and log-probabilities out: an engine never sees text and never re-tokenises.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from rft.config import RunConfig, VllmEngineConfig
    from rft.engines.transfer import Transport


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one completion. No top-p or top-k: the log-probabilities stay those of the full vocabulary."""

    max_tokens: int
    temperature: float
    seed: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled: `logprobs[i]` is the natural log-probability of `ids[i]` at the sampling temperature.

    With `finish_reason == "stop"` the last id is one of the stop ids.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    policy_version: int


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """Weights that an engine can load: a whole model's folder (`merged`), a peft folder (`adapter`), or tensors
    (`transfer`) that take the place of those in the folder `path`.

    tensors: starts a pass over all of them, in the names and shapes of a checkpoint; its user closes it.
    """

    version: int
    path: Path
    kind: Literal["merged", "adapter", "transfer"] = "merged"
    tensors: Callable[[], Generator[tuple[str, Tensor], None, None]] | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is doing now; `kv_cache_use` is a share between 0 and 1."""

    num_running: int
    num_waiting: int
    kv_cache_use: float


class Engine(Protocol):
    """A sampler of the current policy. All methods may run concurrently except `load`, which waits its turn."""

    policy_version: int
    max_model_len: int  # prompt and completion together
    max_concurrent: int  # sequences sampled at once
    on_status: Callable[[str], None]  # gets a short line now and then while `start` runs

    async def start(self) -> None:
        """Be ready to sample, or raise `EngineError` naming cause and cure."""
        ...

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion: ...

    async def load(self, weights: PublishedWeights) -> None:
        """Sample from `weights` from now on; caches of older versions are dropped."""
        ...

    async def score(self, ids: list[int], start: int) -> list[float]:
        """Log-probabilities at temperature 1 of `ids[start:]` given what precedes each (the sync's probe)."""
        ...

    async def load_metrics(self) -> EngineLoad: ...

    async def close(self) -> None: ...


@runtime_checkable
class SleepingEngine(Protocol):
    """An engine that can give its GPU's memory to somebody else for a while."""

    async def sleep(self) -> None:
        """Give it back, once no request is in flight; later ones wait for `wake`."""
        ...

    async def wake(self) -> None:
        """Take it again. Samples from the weights it had."""
        ...


def sync_kind(
    mode: Literal["auto", "adapter", "merged", "reload", "transfer"], device_type: str = "", *, is_lora: bool = True
) -> Literal["adapter", "merged", "transfer"]:
    """How weights travel. `auto` is adapters on CUDA, merged weights elsewhere (vLLM's CPU adapters are slow).

    The whole model travels as merged weights do, as a model folder that is reloaded, unless `transfer` is asked for.
    device_type: where the policy is; empty asks torch whether there is a GPU.
    """
    if not is_lora:
        return "transfer" if mode == "transfer" else "merged"
    if mode in ("adapter", "merged"):
        return "adapter" if mode == "adapter" else "merged"
    if not device_type:
        import torch

        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return "adapter" if device_type == "cuda" else "merged"


def build_engine(config: RunConfig, log_path: Path) -> Engine:
    """The engine that `config.engine.type` names, imported when used; the first launched server logs to `log_path`."""
    if config.engine.type == "vllm":
        return _build_vllm(config, config.engine, log_path)
    from rft.engines.transformers import TransformersEngine

    return TransformersEngine(config.engine, config.model)


def _build_vllm(config: RunConfig, engine: VllmEngineConfig, log_path: Path) -> Engine:
    from rft.engines.pool import EnginePool
    from rft.engines.vllm import VllmEngine
    from rft.wire import safe_url

    rank = max_lora_rank(config)
    if engine.url is None:
        logs = [log_path, *(log_path.with_stem(f"{log_path.stem}-{i}") for i in range(1, engine.num_servers))]
        devices: list[str] | list[None] = engine.devices or [None] * len(logs)
        transport = _build_transport(None) if config.training.sync == "transfer" else None
        launched = [
            VllmEngine(engine, config.model, log, rank, transport=transport, devices=device)
            for log, device in zip(logs, devices, strict=True)
        ]
        return launched[0] if len(launched) == 1 else EnginePool(launched)
    urls = [engine.url] if isinstance(engine.url, str) else engine.url
    if config.training.sync == "transfer":  # of one server, and it cannot begin anew
        return VllmEngine(engine, config.model, log_path, rank, url=urls[0], transport=_build_transport(urls[0]))
    given = [VllmEngine(engine, config.model, log_path, rank, url=url) for url in urls]
    return EnginePool(given, [safe_url(url) for url in urls], engine.outage_limit_s)


def max_lora_rank(config: RunConfig) -> int | None:
    """Of the adapters that a server must accept; None when weights travel otherwise."""
    lora = config.model.lora
    return lora.rank if lora is not None and sync_kind(config.training.sync) == "adapter" else None


def _build_transport(url: str | None) -> Transport:
    """CUDA IPC to a server that we launch, for it has our GPU; NCCL, which refuses two users of one GPU, to others.

    Raises ConfigError without a GPU.
    """
    import torch

    from rft.engines.transports import IpcTransport, NcclTransport
    from rft.errors import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError("transfer needs a GPU", where="training.sync", cure="set training.sync=reload")
    return IpcTransport() if url is None else NcclTransport(url)
