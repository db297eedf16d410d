"""The forward pass of a policy: a micro-batch in, log-probabilities out; and how its models get to their place.

A model is loaded, gets its adapters, goes to the device of its rank or is spread over all ranks; then it is scored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rft.config import ModelConfig
from rft.trainers import sharding
from rft.trainers.attention import attention_inputs
from rft.trainers.batch import MicroBatch
from rft.trainers.head import decoder, find_head, token_logprobs
from rft.trainers.model import checkpoint_gradients, load_model
from rft.trainers.ranks import Ranks
from rft.trainers.weights import Weights, build_weights


class Scorer(nn.Module):
    """MicroBatch -> ([N] log-probabilities, [P] entropies): the forward pass as one module, so that it can be sharded.

    model: what is called, or its causal LM wrapped in adapters.
    """

    def __init__(self, model: nn.Module, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.causal_lm = causal_lm
        self.head = find_head(causal_lm)

    def forward(
        self, micro_batch: MicroBatch, temperature: float, with_entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        inputs = attention_inputs(self.causal_lm, micro_batch)
        output = decoder(self.causal_lm)(
            input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, use_cache=False, **inputs
        )
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, micro_batch.predictors)
        index, targets = micro_batch.predictor_index, micro_batch.targets
        return token_logprobs(self.head, hidden, index, targets, temperature, with_entropy_grad)


class Loader:
    """Loads the models of one rank's policy. `is_sharded`: their weights are spread over the ranks."""

    def __init__(self, config: ModelConfig, ranks: Ranks, *, is_sharded: bool) -> None:
        self._config, self._ranks, self._is_sharded = config, ranks, is_sharded
        self._dtype: torch.dtype = getattr(torch, config.dtype)

    def trained(self, *, is_merged: bool, has_checkpointing: bool, seed: int) -> tuple[Weights, Scorer]:
        """The model that is trained; see lora.py for `is_merged`. Raises ConfigError."""
        is_lora = self._config.lora is not None
        # a shard is its own master: it is stepped as it is stored, and cast when it is gathered
        is_master = self._is_sharded and not is_lora and self._config.master_dtype != "bfloat16"
        dtype = torch.float32 if is_master else self._dtype
        model = load_model(self._config.path, dtype, self._ranks.device)
        if has_checkpointing:
            checkpoint_gradients(model)
        self._to_device(model)
        weights = build_weights(model, self._config, is_merged, seed)
        adapters = weights.parameters if is_lora else []
        return weights, self._spread(Scorer(weights.model, model), model, adapters)

    def reference(self) -> Scorer | None:
        """The second model of the KL term; None where the reference is the trained one without its adapter."""
        config = self._config
        if config.reference is None and config.lora is not None:
            return None
        path, field = (config.reference, "model.reference") if config.reference else (config.path, "model.path")
        model = load_model(path, self._dtype, self._ranks.device, field)
        model.requires_grad_(False)
        self._to_device(model)
        return self._spread(Scorer(model, model), model, [])

    def _to_device(self, model: nn.Module) -> None:
        if not self._is_sharded:  # a sharded one goes to its device layer by layer
            nn.Module.to(model, self._ranks.device)

    def _spread(self, scorer: Scorer, model: PreTrainedModel, adapters: list[nn.Parameter]) -> Scorer:
        if self._is_sharded:
            for adapter in adapters:
                adapter.data = adapter.data.to(self._ranks.device)
            sharding.shard(scorer, model, self._dtype, adapters, self._ranks)
        return scorer
