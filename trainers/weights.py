"""What is trained of a model: adapters (lora.py) or the model itself (full.py), behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from rft.config import ModelConfig


class Weights(Protocol):
    """The trained weights of one policy. Methods that say so are collective where weights are sharded over ranks."""

    causal_lm: PreTrainedModel  # the model as transformers knows it

    @property
    def model(self) -> nn.Module:
        """What holds all weights: the causal LM, or one with its adapters around it."""
        ...

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps, in a fixed order; masters where there are any."""
        ...

    def after_step(self) -> None:
        """The optimizer changed `parameters`: bring the model to them."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """What an engine loads: every weight of the model in its dtype, on the CPU where sharded; tied ones once.

        Collective. Tensors may be the model's own: copy before changing them.
        """
        ...

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same one after another, on the device of the model: only one is whole at a time where sharded.

        Collective: every rank takes all of them.
        """
        ...

    def save(self, path: Path, *, writes: bool = True) -> None:
        """Write what is trained into the folder `path`; collective, ranks without `writes` only take part."""
        ...

    def load(self, path: Path) -> None:
        """Replace what is trained by what `save` wrote. Raises UserError when it does not fit."""
        ...


def build_weights(model: PreTrainedModel, config: ModelConfig, is_merged: bool, seed: int) -> Weights:
    """The weights that `config` asks to train of a loaded model; what `is_merged` means is in lora.py.

    Raises ConfigError for names that the model does not have.
    """
    if config.lora is not None:
        from rft.trainers.lora import LoraWeights

        return LoraWeights(model, config.lora, is_merged, seed)
    from rft.trainers.full import FullWeights

    return FullWeights(model, config)
