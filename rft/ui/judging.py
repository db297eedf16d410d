"""What a grader that came from the page may be, and who judges for it: a seam, as a server has rules of its own."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from fastapi import Request
from pydantic import ValidationError

from rft.errors import ConfigError
from rft.graders import judge_models
from rft.graders.judge import JudgeConfig, Judges
from rft.graders.run import validate
from rft.ui.runs import Known

_REDACTED = "[redacted]"  # what configs show in place of a secret


class Judging(Protocol):
    """How one application takes graders."""

    def owner(self, request: Request) -> str:
        """Whose tries count together: one at a time."""
        ...

    async def judges(self, request: Request, known: Known, grader: dict[str, Any]) -> Judges:
        """The models that a good grader asks; the caller closes them. Raises ConfigError naming the field."""
        ...


class FolderJudging:
    """Whoever reaches the page may try any grader that loads no model; its judges are the run's, where they have URLs.

    Keys of judges come from the environment, as in the run.
    """

    def owner(self, request: Request) -> str:
        return ""

    async def judges(self, request: Request, known: Known, grader: dict[str, Any]) -> Judges:
        return await asyncio.to_thread(self._judges, known, grader)

    def _judges(self, known: Known, grader: dict[str, Any]) -> Judges:
        spec = validate(grader)
        refuse_models(grader)
        configured = known.store.config().get("judges", {}) if known.store is not None else {}
        return Judges({name: _judge(name, configured.get(name)) for name in judge_models(spec)})


def refuse_models(grader: dict[str, Any]) -> None:
    """Raises ConfigError for a grader that would load an embedding model: that takes longer than a try may."""
    parts = grader.get("graders")
    for path, part in (("grader", grader), *(parts.items() if isinstance(parts, dict) else ())):
        if isinstance(part, dict) and (part.get("evaluation_metric") == "cosine" or "embedding_model" in part):
            cure = "use another metric here, or `rft grade rerun RUN --grader FILE`"
            where = path if path == "grader" else f"grader.graders.{path}"
            raise ConfigError("the metric cosine loads a model, which the page does not", where=where, cure=cure)


def refuse_redacted(tree: Any, where: str = "grader") -> None:
    """Raises ConfigError for a header whose value the page has hidden: it would be sent as it stands."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        path = f"{where}.{key}"
        if key == "headers" and isinstance(value, dict) and _REDACTED in value.values():
            cure = "write it again: it leaves this page only for the grader's own URL"
            raise ConfigError(
                "the page does not show the values of headers, and does not know them", where=path, cure=cure
            )
        refuse_redacted(value, path)


def _judge(name: str, configured: Any) -> JudgeConfig:
    """Raises ConfigError where the run's config gives the model no URL."""
    if not isinstance(configured, dict) or not configured.get("url"):
        problem = f"the grader asks the model {name}, and the run's config has no URL for it"
        cure = f"add judges: {{{name}: {{url: ...}}}} to the config of a run, or `rft grade rerun RUN --judge NAME=URL`"
        raise ConfigError(problem, where="grader", cure=cure)
    try:
        return JudgeConfig.model_validate(configured)
    except ValidationError:
        problem = f"judges.{name} of the run is not what this version of rft reads"
        raise ConfigError(problem, where="grader", cure="`rft grade rerun RUN --judge NAME=URL`") from None
