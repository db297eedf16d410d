"""A way into the workers of a real vLLM server that needs no GPU: files, beside vLLM's own backends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rft.engines.vllm_worker import HeadRefresh


@dataclass
class InitInfo(WeightTransferInitInfo):
    greeting: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    path: str


class FileTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The life cycle of vLLM's NCCL engine (layerwise reload, chunks cut apart by its own code), another carrier."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        Path(init_info.greeting).touch()

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # and no synchronisation of an accelerator

    def receive_weights(self, update_info: UpdateInfo) -> None:
        packed = load_file(update_info.path)["packed"]
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        counts = [torch.Size(shape).numel() for shape in update_info.shapes]
        sizes = [count * dtype.itemsize for count, dtype in zip(counts, dtypes, strict=True)]
        self.model.load_weights(unpack_tensor(packed, update_info.names, update_info.shapes, dtypes, sizes))

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("files", __name__, "FileTransferEngine")


class Extension(HeadRefresh):
    """What rft adds to workers; importing this module is what registers the backend."""
