"""Weights straight from the trainer's memory into a vLLM server, chunk by chunk through its weight-transfer engine.

Owns the calls and their order: /init_weight_transfer_engine once; for every version /start_weight_update, an
/update_weights for each chunk while the transport hands it over, /finish_weight_update. Every wait for the server has
a deadline, and whichever side fails first ends the transfer: the other is not waited for. Does not keep requests out
and does not empty caches; the engine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rft.errors import EngineError
from rft.threads import DaemonThreads

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Named = tuple[str, "Tensor"]
Post = Callable[[str, dict[str, Any], float], Awaitable[Any]]  # path, body, deadline in seconds
Get = Callable[[str], Awaitable[bytes]]

_CURE = "read the server's log; training.sync=reload needs no transfer"
_THREADS = DaemonThreads()  # a transport that hangs must not keep the process from ending


class Transport(Protocol):
    """How tensors get from this process to a server's workers. Its methods block; one runs at a time.

    They raise RuntimeError, OSError or ValueError, as CUDA, NCCL and sockets do, or EngineError.
    """

    backend: str  # vLLM's name of it
    chunk_bytes: int  # of a chunk, unless a single tensor is larger

    def init_info(self, num_workers: int) -> dict[str, Any]:
        """What the workers need to know to meet us."""
        ...

    def connect(self, timeout_s: float) -> None:
        """Meet the workers, while they handle `init_info`."""
        ...

    def offer(self, chunk: list[Named]) -> dict[str, Any]:
        """Prepare tensors of one dtype; what the workers need to know to take them."""
        ...

    def send(self) -> None:
        """Hand over what was offered last, while the workers handle the offer."""
        ...

    def finish(self) -> None:
        """Let go of what was sent: the workers have it."""
        ...


class Transfer:
    """One server's end of a `transport`. `timeout_s` is the deadline of every single call."""

    def __init__(self, transport: Transport, timeout_s: float, *, post: Post, get: Get) -> None:
        self._transport, self._timeout_s, self._post, self._get = transport, timeout_s, post, get

    async def connect(self) -> None:
        """Meet all workers of the server. Raises EngineError naming the flags that the server needs."""
        cure = (
            "start the server with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config "
            f"'{json.dumps({'backend': self._transport.backend})}', or set training.sync=reload"
        )
        with _told("the server cannot be given weights", cure):
            num_workers = int(json.loads(await self._get("/get_world_size"))["world_size"])
            info = await _in_thread(self._transport.init_info, num_workers)
            await self._both(
                self._call("/init_weight_transfer_engine", {"init_info": info}),
                lambda: self._transport.connect(self._timeout_s),
            )

    async def send(self, tensors: Generator[Named, None, None]) -> None:
        """Replace the server's weights by `tensors`, in the names and shapes of a checkpoint.

        Raises EngineError; the server's weights are then of no version. What gathering them raises comes through.
        """
        chunks = _chunks(tensors, self._transport.chunk_bytes)
        try:
            with _told("the server did not take the new weights", _CURE):
                await self._call("/start_weight_update", {})
            # the ranks that gather with us have a deadline of their own
            while (chunk := await _in_thread(next, chunks, None)) is not None:
                with _told("the server did not take the new weights", _CURE):
                    offer = await _in_thread(self._transport.offer, chunk)
                    await self._both(self._call("/update_weights", {"update_info": offer}), self._transport.send)
            with _told("the server did not take the new weights", _CURE):
                await self._call("/finish_weight_update", {})
                await _in_thread(self._transport.finish)
        finally:
            with contextlib.suppress(ValueError):  # it is running: this task was cancelled meanwhile
                tensors.close()

    async def _call(self, path: str, body: dict[str, Any]) -> None:
        await self._post(path, body, self._timeout_s)

    async def _both(self, call: Coroutine[Any, Any, None], work: Callable[[], None]) -> None:
        """The server's half and ours at once; the first failure ends both waits."""
        halves = {asyncio.ensure_future(call), asyncio.ensure_future(_in_thread(work))}
        try:
            async with asyncio.timeout(self._timeout_s):
                done, _ = await asyncio.wait(halves, return_when=asyncio.FIRST_EXCEPTION)
                for half in done:
                    half.result()
        except TimeoutError:
            raise EngineError(f"trainer and server did not meet within {self._timeout_s:.0f} s") from None
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)


async def _in_thread(work: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *args)


@contextlib.contextmanager
def _told(problem: str, cure: str) -> Iterator[None]:
    """What failed inside, as an EngineError that trying again does not help."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{problem}: {error.problem}", cure=cure) from error
    except (RuntimeError, OSError, ValueError) as error:  # what a transport raises
        raise EngineError(f"{problem}: {type(error).__name__}: {error}", cure=cure) from error


def _chunks(tensors: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    """Neighbours of one dtype (workers cut a chunk's bytes at multiples of its size), together at most `max_bytes`."""
    chunk: list[Named] = []
    size = 0
    for name, tensor in tensors:
        if chunk and (size + tensor.nbytes > max_bytes or tensor.dtype != chunk[0][1].dtype):
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk
