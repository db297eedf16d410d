"""Sampling in this process with transformers: slow, no server, reproducible.

Guarantees: a request's ids follow from its own seed and its prompt, drawn by inverse CDF from the float32
distribution that `logprobs` names. The requests waiting at one moment are one batch, sorted by rollout id: the same
set gives the same bits on the same machine. Another set rounds differently in the last digits; with
`max_concurrent: 1` every request runs alone and depends on nothing else. All model work happens in one thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from rft.config import ModelConfig, TransformersEngineConfig
from rft.engines import Completion, EngineLoad, PublishedWeights, SamplingParams
from rft.errors import EngineError
from rft.threads import LOADING_A_MODEL

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Request:
    prompt_ids: list[int]
    params: SamplingParams
    rollout_id: str
    result: asyncio.Future[Completion]


class TransformersEngine:
    """The engine `transformers`, on a GPU when torch sees one."""

    def __init__(self, config: TransformersEngineConfig, model: ModelConfig) -> None:
        self.policy_version = 0
        self.max_concurrent = config.max_concurrent
        self.max_model_len = config.max_model_len
        self.on_status: Callable[[str], None] = lambda _: None
        self._config, self._model_config = config, model
        self._model: PreTrainedModel | None = None
        self._adapted: PeftModel | None = None
        self._waiting: list[_Request] = []
        self._num_running = 0
        self._batches: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rft-sampling")

    async def start(self) -> None:
        """Load the model. Raises EngineError when its folder cannot be read."""
        self.on_status("loading the sampling model")
        self._model = await self._run(lambda: self._load_model(self._model_config.path))

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        """Sample one completion; `max_tokens` is cut to what the context leaves, at least one token must fit."""
        if len(prompt_ids) >= self.max_model_len:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens leaves no room in {self.max_model_len}")
        request = _Request(prompt_ids, params, rollout_id, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run_batches())
        return await request.result

    async def score(self, ids: list[int], start: int) -> list[float]:
        """Log-probabilities at temperature 1 of `ids[start:]`; start >= 1, len(ids) <= max_model_len."""
        if not 1 <= start <= len(ids) <= self.max_model_len:
            raise ValueError(f"cannot score {len(ids)} ids from {start}: the context is {self.max_model_len}")
        return await self._run(lambda: _score(self._ready(), ids, start))

    async def load(self, weights: PublishedWeights) -> None:
        """Sample from `weights` from now on; batches that already run finish first."""
        await self._run(lambda: self._load_weights(weights))

    async def load_metrics(self) -> EngineLoad:
        return EngineLoad(self._num_running, len(self._waiting), 0.0)

    async def close(self) -> None:
        """Fail what waits and free the model; a batch that runs is finished first."""
        for request in self._take(len(self._waiting)):
            _fail(request, EngineError("the engine was closed", cure="do not close an engine that is sampled from"))
        await asyncio.to_thread(self._thread.shutdown, True)
        self._model = self._adapted = None

    async def _run_batches(self) -> None:
        """Batch after batch until nobody waits. Requests made in the same turn of the event loop go together."""
        await asyncio.sleep(0)
        while batch := self._take(self._config.max_concurrent):
            batch.sort(key=lambda request: (request.rollout_id, request.prompt_ids, request.params.seed))
            self._num_running = len(batch)
            try:
                completions = await self._run(partial(self._sample, batch))
            except Exception as error:  # a batch's failure belongs to whoever asked for it, not to this task
                for request in batch:
                    _fail(request, error)
            else:
                for request, completion in zip(batch, completions, strict=True):
                    if not request.result.done():
                        request.result.set_result(completion)
            finally:
                self._num_running = 0

    def _take(self, count: int) -> list[_Request]:
        """Remove up to `count` requests from those waiting; requests nobody waits for any more are dropped."""
        alive = [request for request in self._waiting if not request.result.done()]
        taken, self._waiting = alive[:count], alive[count:]
        return taken

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _ready(self) -> PreTrainedModel:
        if self._model is None:
            raise EngineError("the engine has not been started", cure="await engine.start() first")
        return self._model

    def _load_model(self, path: Path) -> PreTrainedModel:
        """The model in `path`, whose weights have the names and the form of published ones."""
        options = {"attn_implementation": "sdpa", "local_files_only": True, "output_loading_info": True}
        dtype = getattr(torch, self._config.dtype or self._model_config.dtype)
        loaded: Any
        try:
            with LOADING_A_MODEL:
                loaded = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, **options)
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be loaded: {error}", cure="check model.path") from error
        model: PreTrainedModel = loaded[0]
        missing = loaded[1]["missing_keys"]
        if missing:  # transformers would draw them at random
            raise EngineError(f"{path} lacks weights of the model: {sorted(missing)[:3]}", cure="check model.path")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval().to(device)  # type: ignore[no-any-return]

    def _load_weights(self, weights: PublishedWeights) -> None:
        model, device = self._ready(), str(self._ready().device)
        if weights.kind == "merged":
            del model
            self._model = None  # never two models at a time
            self._model = self._load_model(weights.path)
        elif self._adapted is None:
            self._adapted = PeftModel.from_pretrained(model, str(weights.path), adapter_name="policy").eval()
        else:
            set_peft_model_state_dict(self._adapted, load_peft_weights(str(weights.path), device), "policy")
        self.policy_version = weights.version

    def _sample(self, batch: list[_Request]) -> list[Completion]:
        rows = [
            _Row(
                request.prompt_ids,
                request.params,
                min(request.params.max_tokens, self.max_model_len - len(request.prompt_ids)),
            )
            for request in batch
        ]
        with torch.inference_mode():
            _decode(self._ready(), rows)
        return [Completion(row.ids, row.logprobs, row.finish_reason, self.policy_version) for row in rows]


class _Row:
    """One completion in the making."""

    def __init__(self, prompt_ids: list[int], params: SamplingParams, max_tokens: int) -> None:
        self.prompt_ids, self.params, self.max_tokens = prompt_ids, params, max_tokens
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.generator = torch.Generator().manual_seed(params.seed)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        return "stop" if self.ids and self.ids[-1] in self.params.stop_token_ids else "length"

    @property
    def is_done(self) -> bool:
        return len(self.ids) >= self.max_tokens or self.finish_reason == "stop"


def _decode(model: PreTrainedModel, rows: list[_Row]) -> None:
    """Fill the rows' ids and log-probabilities, one token per row and forward pass."""
    logits, cache, lengths, width = _prefill(model, rows)
    while True:
        _draw(logits, rows)
        kept = [index for index, row in enumerate(rows) if not row.is_done]
        if not kept:
            return
        if len(kept) < len(rows):
            index = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(index)
            rows, lengths = [rows[i] for i in kept], lengths[index]
        width, lengths = width + 1, lengths + 1
        output = model(
            input_ids=torch.tensor([row.ids[-1:] for row in rows], device=model.device),  # [B, 1]
            attention_mask=_mask(lengths, width),
            position_ids=lengths[:, None] - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]


def _prefill(model: PreTrainedModel, rows: list[_Row]) -> tuple[Tensor, DynamicCache, Tensor, int]:
    """Run the distinct prompts, left-padded: [B, V] logits, the cache, [B] prompt lengths, padded width."""
    prompts = sorted({tuple(row.prompt_ids) for row in rows})
    width = max(len(prompt) for prompt in prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = _mask(lengths, width)
    cache = DynamicCache(config=model.config)
    output: Any = model(
        input_ids=torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    place = {prompt: index for index, prompt in enumerate(prompts)}
    index = torch.tensor([place[tuple(row.prompt_ids)] for row in rows], device=model.device)
    cache.batch_select_indices(index)
    return output.logits[index, -1], cache, lengths[index], width


def _mask(lengths: Tensor, width: int) -> Tensor:
    """[B, width] int64, 1 on the last `lengths` positions: the padding is on the left."""
    return (torch.arange(width, device=lengths.device)[None] >= width - lengths[:, None]).long()


def _draw(logits: Tensor, rows: list[_Row]) -> None:
    """Append one id to every row. logits: [B, V], any float dtype."""
    temperature = torch.tensor([row.params.temperature for row in rows], device=logits.device)
    logprobs = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)  # [B, V] float32
    cumulative = logprobs.double().exp().cumsum(-1)
    uniform = torch.stack([torch.rand((1,), generator=row.generator, dtype=torch.float64) for row in rows])  # [B, 1]
    places = torch.searchsorted(cumulative, uniform.to(logits.device) * cumulative[:, -1:], right=True)
    ids = places.clamp(max=logits.shape[-1] - 1)  # [B, 1]
    for row, token, logprob in zip(rows, ids[:, 0].tolist(), logprobs.gather(-1, ids)[:, 0].tolist(), strict=True):
        row.ids.append(token)
        row.logprobs.append(logprob)


def _score(model: PreTrainedModel, ids: list[int], start: int) -> list[float]:
    with torch.inference_mode():
        row = torch.tensor([ids], device=model.device)
        logits = model(input_ids=row, use_cache=False, logits_to_keep=len(ids) - start + 1).logits[0, :-1]
        logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, row[0, start:, None])
    scores: list[float] = logprobs[:, 0].tolist()
    return scores


def _fail(request: _Request, error: Exception) -> None:
    if not request.result.done():
        request.result.set_exception(error)
