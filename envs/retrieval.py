"""Search over local documents: BM25, a local embedding model, or both fused by rank.

Guarantees: the same query gives the same documents in the same order; the index is built once, in a thread, and a slow
one is kept beside the documents under their content's hash; ids that the model invents are errors it can read.
The index itself is in retrieval_index.py.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rft.envs.base import Session, ToolSpecs
from rft.envs.documents import Document, load_documents
from rft.envs.outage import Outages
from rft.envs.tasks import ArgumentError, Tool
from rft.envs.toolbox import Toolbox
from rft.errors import UserError
from rft.types import Item, ToolCall, ToolResult

if TYPE_CHECKING:
    from rft.envs.retrieval_index import Index

_MAX_ID_CHARS = 200  # of an id we quote


class RetrievalEnvironmentConfig(BaseModel):
    """`documents`: JSONL with `id`, `text` and perhaps `title`; or a folder of .md, .txt and .rst files.

    embedding_model: a local folder that AutoModel accepts; then results of both searches are fused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["retrieval"] = "retrieval"
    documents: Path
    embedding_model: Path | None = None
    top_k: int = Field(default=5, ge=1, description="results when the model does not say how many")
    max_top_k: int = Field(default=20, ge=1)
    result_chars: int = Field(default=300, ge=20, description="of a document's text in a search result")
    read_chars: int = Field(default=8000, ge=100, le=200_000, description="of one read; the model can read on")
    timeout_s: float = Field(default=60.0, gt=0, description="per call")

    @model_validator(mode="after")
    def _default_fits(self) -> RetrievalEnvironmentConfig:
        if self.top_k > self.max_top_k:
            raise ValueError(f"top_k is {self.top_k}, more than max_top_k, which is {self.max_top_k}")
        return self


class RetrievalEnvironment:
    """One index for all rollouts; nothing in it changes."""

    def __init__(self, config: RetrievalEnvironmentConfig) -> None:
        self.config = config
        self.outages = Outages()  # of which an index in this process has none
        self._loading = threading.Lock()
        self._loaded: tuple[dict[str, Document], Index] | None = None
        self._toolbox = Toolbox(self._tools(), config.timeout_s)

    async def discover(self) -> ToolSpecs:
        return {tool.name: tool.spec() for tool in self._tools()}

    async def check(self) -> None:
        """Read the documents and load or build the index. Raises UserError naming file, line and cure."""
        await asyncio.to_thread(self._load)

    async def open(self, item: Item, rollout_id: str) -> RetrievalSession:
        await asyncio.to_thread(self._load)  # where nobody called check: not on a call's time
        return RetrievalSession(self._toolbox, item)

    async def close(self) -> None:
        """Nothing to release."""

    def _load(self) -> tuple[dict[str, Document], Index]:
        with self._loading:  # a burst of first rollouts must not build it once each
            if self._loaded is None:
                model = self.config.embedding_model
                if model is not None and not (model / "config.json").is_file():
                    cure = "name a folder that AutoModel.from_pretrained accepts"
                    raise UserError(f"{model} has no config.json", where="environment.embedding_model", cure=cure)
                documents = load_documents(self.config.documents)
                from rft.envs.retrieval_index import load_or_build

                self._loaded = documents, load_or_build(self.config.documents, list(documents.values()), model)
            return self._loaded

    def _tools(self) -> list[Tool]:
        config = self.config

        def search(query: str, top_k: Annotated[int, Field(ge=1)] = config.top_k) -> str:
            """Find documents by words; each result has an id that read takes."""
            documents, index = self._load()
            found = index.search(query, min(top_k, config.max_top_k))
            if not found:
                return "no document found: try other words"
            results = (f"id: {name}\n{index.excerpt(documents[name], query, config.result_chars)}" for name in found)
            return "\n\n".join(results)

        def read(id: str, start: Annotated[int, Field(ge=0)] = 0) -> str:
            """Read a document.

            Args:
                id: as search gave it
                start: the character to begin with
            """
            document = self._load()[0].get(id)
            if document is None:
                raise ArgumentError(f"there is no document {id[:_MAX_ID_CHARS]}: search gives the ids")
            return part_of(document, start, config.read_chars)

        return [Tool(search), Tool(read)]


def part_of(document: Document, start: int, num_chars: int) -> str:
    """What one read shows. Raises ArgumentError beyond the end."""
    text = document.text
    if start > 0 and start >= len(text):
        raise ArgumentError(f"the document has {len(text):,} characters: start must be less")
    end = start + num_chars
    title = f"{document.title}\n\n" if document.title and start == 0 else ""
    rest = f"\n\n... {len(text) - end:,} more characters: read on with start={end}" if end < len(text) else ""
    return f"{title}{text[start:end]}{rest}"


class RetrievalSession(Session):
    """The tools of one rollout; they keep nothing."""

    def __init__(self, toolbox: Toolbox, item: Item) -> None:
        self._toolbox, self._item = toolbox, item

    async def call(self, call: ToolCall) -> ToolResult:
        return await self._toolbox.call(call, self._item)

    async def close(self) -> None:
        """Nothing to release."""
