"""The two ways into a vLLM server's memory: CUDA IPC on one GPU, NCCL between GPUs. Not measured on a GPU.

Both pack a chunk into one buffer of bytes, in the layout of vLLM's own packed mode, which its workers cut apart again.
`NcclTransport` is the one place where the trainer's process imports vLLM: the server's workers meet through its
rendezvous and its wrapper of NCCL, and nothing else speaks with them. (Importing vLLM sets a few environment
variables of torch's compiler.)
"""

from __future__ import annotations

import base64
import pickle
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rft.engines.transfer import Named
from rft.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_BYTES = 512 * 2**20
_DEVICE = "cuda:0"  # rank 0 has the first GPU that the run may use; a server that it launches has it too


class IpcTransport:
    """CUDA IPC: a worker maps the chunk where it lies. For a launched server, which shares rank 0's GPU.

    vLLM unpickles what it is sent: only for a server whose socket nobody else reaches.
    """

    backend = "ipc"
    chunk_bytes = _CHUNK_BYTES

    def __init__(self) -> None:
        self._packed: Tensor | None = None  # alive until the worker has copied it

    def init_info(self, num_workers: int) -> dict[str, Any]:
        """Raises EngineError for a server on several GPUs."""
        if num_workers != 1:
            raise EngineError(f"CUDA IPC reaches one GPU, the launched server uses {num_workers}")
        return {"packed": True}

    def connect(self, timeout_s: float) -> None:
        """Nothing to meet: the handle of a chunk is all a worker needs."""

    def offer(self, chunk: list[Named]) -> dict[str, Any]:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        self._packed = packed(chunk, _DEVICE)
        torch.cuda.synchronize(_DEVICE)
        handle = {str(torch.cuda.get_device_properties(_DEVICE).uuid): reduce_tensor(self._packed)[1]}
        return {
            **described(chunk),
            "tensor_sizes": [tensor.nbytes for _, tensor in chunk],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handle)).decode(),
        }

    def send(self) -> None:
        """Nothing to do: the worker reads."""

    def finish(self) -> None:
        import torch

        self._packed = None
        torch.cuda.ipc_collect()


class NcclTransport:
    """NCCL broadcasts from rank 0 to all workers of a server on other GPUs, here or on another machine."""

    backend = "nccl"
    chunk_bytes = _CHUNK_BYTES

    def __init__(self, url: str) -> None:
        self._url = url
        self._listener: socket.socket | None = None
        self._world_size = 0
        self._group: Any = None
        self._packed: Tensor | None = None

    def init_info(self, num_workers: int) -> dict[str, Any]:
        self._world_size = 1 + num_workers
        self._listener = socket.create_server((_address_towards(self._url), 0))
        host, port = self._listener.getsockname()[:2]
        return {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": self._world_size,
            "packed": True,
            "packed_buffer_size_bytes": self.chunk_bytes,
            "packed_num_buffers": 1,
        }

    def connect(self, timeout_s: float) -> None:
        """Raises EngineError without vLLM."""
        import torch

        try:
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
            from vllm.distributed.utils import StatelessProcessGroup
        except ImportError as error:
            raise EngineError(f"NCCL needs vLLM beside the trainer too: {error}") from error
        assert self._listener is not None, "init_info comes first"
        host, port = self._listener.getsockname()[:2]
        meeting = StatelessProcessGroup.create(
            host, port, 0, self._world_size, store_timeout=int(timeout_s), listen_socket=self._listener
        )
        with torch.cuda.device(_DEVICE):
            self._group = PyNcclCommunicator(meeting, device=torch.device(_DEVICE))

    def offer(self, chunk: list[Named]) -> dict[str, Any]:
        self._packed = packed(chunk, _DEVICE)
        return described(chunk)

    def send(self) -> None:
        import torch

        with torch.cuda.device(_DEVICE):
            self._group.broadcast(self._packed, src=0)
            torch.cuda.current_stream().synchronize()

    def finish(self) -> None:
        self._packed = None


def packed(chunk: list[Named], device: str) -> Tensor:
    """The bytes of the chunk's tensors, one after another: [B] uint8 on `device`."""
    import torch

    rows = [tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8) for _, tensor in chunk]
    return torch.cat(rows)


def described(chunk: list[Named]) -> dict[str, Any]:
    """Names, dtypes and shapes of the chunk's tensors, as vLLM's workers want them."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
        "shapes": [list(tensor.shape) for _, tensor in chunk],
    }


def _address_towards(url: str) -> str:
    """This machine's address on the way to `url`: nothing is sent to find it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(way.getsockname()[0])
