"""The part of vLLM's HTTP interface that a run uses, in front of an in-process engine, as a program.

`engine_host.py MODEL HOST PORT LOG` samples for real: its log-probabilities are those of the weights that it was told
to load from a folder. LOG gets a JSON line for each request that has come in (`asked`: completion, score or load) and
for each load that is done (`loaded`). While there is a file LOG.completion or LOG.load, such requests are held. Ends on
SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from rft.config import ModelConfig, TransformersEngineConfig
from rft.engines import PublishedWeights, SamplingParams
from rft.engines.transformers import TransformersEngine
from rft.errors import EngineError

MAX_MODEL_LEN = 1024
_HOLD_S = 600.0


class EngineHost:
    """Answers as `vllm serve` in its development mode does."""

    def __init__(self, model: Path, log: Path) -> None:
        config = TransformersEngineConfig(max_model_len=MAX_MODEL_LEN, max_concurrent=16)
        self.engine = TransformersEngine(config, ModelConfig(path=model, dtype="float32"))
        self._log, self._numbers = log, count()
        self.app = Starlette(
            routes=[
                Route("/health", lambda _: PlainTextResponse("")),
                Route("/metrics", lambda _: PlainTextResponse("vllm:num_requests_running 0.0\n")),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/collective_rpc", self._load, methods=["POST"]),
                Route("/reset_prefix_cache", lambda _: JSONResponse({"success": True}), methods=["POST"]),
            ],
        )

    def _models(self, _: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "stand-in", "max_model_len": MAX_MODEL_LEN}]})

    async def _complete(self, request: Request) -> JSONResponse:
        body = await request.json()
        ids: list[int] = body["prompt"]
        self._note(asked="score" if "prompt_logprobs" in body else "completion")
        if "prompt_logprobs" in body:
            scores = await self.engine.score(ids, 1)
            told = [{str(i): {"logprob": score}} for i, score in zip(ids[1:], scores, strict=True)]
            return JSONResponse({"choices": [{"prompt_logprobs": [None, *told]}]})
        number = next(self._numbers)
        params = SamplingParams(body["max_tokens"], body["temperature"], number, tuple(body["stop_token_ids"]))
        await self._released("completion")
        done = await self.engine.generate(ids, params, f"request {number:09d}")
        choice: dict[str, Any] = {"token_ids": done.ids, "finish_reason": done.finish_reason}
        return JSONResponse({"choices": [choice | {"logprobs": {"token_logprobs": done.logprobs}}]})

    async def _load(self, request: Request) -> JSONResponse:
        path = Path((await request.json())["kwargs"]["weights_path"])
        self._note(asked="load", path=str(path))
        await self._released("load")
        try:
            await self.engine.load(PublishedWeights(int(path.name.removeprefix("v")), path))
        except EngineError as error:
            return JSONResponse({"error": {"message": error.problem}}, status_code=500)
        self._note(loaded=path.name)
        return JSONResponse({"results": [None]})

    async def _released(self, what: str) -> None:
        async with asyncio.timeout(_HOLD_S):
            while self._log.with_name(f"{self._log.name}.{what}").exists():  # noqa: ASYNC110 (of another process)
                await asyncio.sleep(0.02)

    def _note(self, **words: str) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps(words) + "\n")


async def serve(model: Path, place: tuple[str, int], log: Path) -> None:
    host = EngineHost(model, log)
    await host.engine.start()
    try:
        await uvicorn.Server(uvicorn.Config(host.app, *place, log_level="warning", access_log=False)).serve()
    finally:
        await host.engine.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), (sys.argv[2], int(sys.argv[3])), Path(sys.argv[4])))
