"""`rft grade`: look at a grader from all sides before a run depends on it. Exits 1 when it fails what was asked."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rft.errors import ConfigError, UserError
from rft.graders import Grader, GraderTools, build_grader
from rft.graders.judge import JudgeConfig, Judges
from rft.graders.run import load_grader
from rft.graders.run import run as run_grader

T = TypeVar("T")
GraderFile = Annotated[Path, typer.Argument(help="a grader as JSON, as hosted RFT takes it; or a run's YAML")]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option("--judge", help="MODEL=URL of a model that the grader asks; the key is taken from OPENAI_API_KEY"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object")]

app = typer.Typer(no_args_is_help=True, help="Validate, try, test and harden graders.")


@app.command()
def validate(grader: GraderFile) -> None:
    """Check a grader and print it with its name, as the hosted API's graders/validate does."""
    typer.echo(json.dumps({"grader": _load(grader).model_dump(mode="json", exclude_none=True)}, indent=2))


@app.command()
def run(
    grader: GraderFile,
    sample: Annotated[str, typer.Option(help="the answer to grade")],
    item: Annotated[Path | None, typer.Option(help="a dataset row as JSON")] = None,
    judge: JudgeOption = None,
) -> None:
    """Grade one answer and print the response of the hosted API's graders/run."""
    spec, row = _load(grader), _row(item)

    async def story(tools: GraderTools) -> dict[str, Any]:
        return await run_grader(spec, row, sample, tools, trace_id="trace_grade_run")

    typer.echo(json.dumps(_with_judges(judge, story), indent=2))


@app.command()
def test(
    grader: GraderFile,
    cases: Annotated[Path, typer.Argument(help="JSONL: {item, answer, score} or {item, answers: best first}")],
    repeats: Annotated[int, typer.Option(min=1, help="grade every answer so often, to see a judge's variance")] = 1,
    judge: JudgeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Grade hand-made answers: do the scores come out as expected, and in the expected order?"""
    from rft.grader_cases import load_cases, test_cases

    spec, loaded = _load(grader), load_cases(cases)
    results = _with_grader(spec, judge, lambda built: test_cases(built, loaded, repeats))
    if as_json:
        typer.echo(json.dumps([result.model_dump() for result in results], indent=2))
    else:
        table = Table("line", "result", "mean scores", "spread over repeats")
        for result in results:
            means = ", ".join(f"{name} {mean:.3f}" for name, mean in result.means.items())
            spreads = ", ".join(f"{name} {spread:.3f}" for name, spread in result.spreads.items())
            verdict = "ok" if result.passed else f"FAILED: {result.problem}"
            table.add_row(*map(Text, (str(result.line), verdict, means, spreads)))
        _print(table)
    failed = [str(result.line) for result in results if not result.passed]
    if failed:
        _end(f"{len(failed)} of {len(results)} cases failed: {cases} line {', '.join(failed)}")


@app.command()
def probe(
    grader: GraderFile,
    items: Annotated[Path, typer.Option(help="a dataset file (JSONL)")],
    num_items: Annotated[int, typer.Option(min=1, help="rows to try")] = 20,
    limit: Annotated[float, typer.Option(help="a worthless answer must not score above this")] = 0.5,
    judge: JudgeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Grade worthless answers (empty, stuffed, injected, ...) and name those that score too high."""
    from rft.data import load_items
    from rft.grader_probes import probe as probe_grader

    spec, rows = _load(grader), load_items(items, None)[:num_items]
    template = json.dumps(spec.model_dump(mode="json", exclude_none=True))
    results = _with_grader(spec, judge, lambda built: probe_grader(built, rows, template, limit))
    if as_json:
        typer.echo(json.dumps([result.model_dump() for result in results], indent=2))
    else:
        table = Table("worthless answer", "mean", "highest", f"share above {limit:g}", "worst item", "errors")
        for r in results:
            values = (f"{r.mean:.3f}", f"{r.highest:.3f}", f"{r.too_high:.2f}", r.worst_item, str(r.num_errors))
            table.add_row(*map(Text, (r.probe, *values)))
        _print(table)
    failed = [result.probe for result in results if result.too_high]
    if failed:
        _end(f"worthless answers score above {limit:g}: {', '.join(failed)}")


@app.command()
def rerun(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    grader: Annotated[Path, typer.Option("--grader", help="a grader as JSON")],
    judge: JudgeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Grade a run's stored rollouts with another grader, without sampling, and compare the two."""
    from rft.regrade import regrade
    from rft.store import RunStore

    spec, store = _load(grader), RunStore.open(run_folder)
    result = _with_grader(spec, judge, lambda built: regrade(store, built, spec.name))
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
        return
    correlation = "-" if result.rank_correlation is None else f"{result.rank_correlation:.3f}"
    typer.echo(
        f"{result.num_rollouts} rollouts: mean {result.mean_old:.4f} in the run, {result.mean_new:.4f} now; "
        f"rank correlation {correlation}; {result.num_failed} failed, {result.num_flagged} with an error flag"
    )
    for rollout, old, new in result.farthest:
        typer.echo(f"  {rollout}  {old:.3f} -> {new:.3f}")
    typer.echo(f"every grade: {result.path}")


def _load(path: Path) -> Any:
    if path.suffix not in (".yaml", ".yml"):
        return load_grader(_read(path), str(path))
    from rft.config import read_tree
    from rft.graders.run import validate as validate_grader

    tree = read_tree(path, None, example="configs/quickstart.yaml")
    if "grader" not in tree:
        raise ConfigError("has no grader", where=str(path), cure="give a run's config, or a grader as JSON")
    return validate_grader(tree["grader"], f"{path}: grader")


def _row(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        row = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", where=str(path), cure="correct the file") from None
    if not isinstance(row, dict):
        raise ConfigError("is not a JSON object", where=str(path), cure="give one dataset row")
    return row.get("item", row) if set(row) == {"item"} else row


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), cure="check the path") from None


def _with_grader(spec: Any, judge: list[str] | None, story: Callable[[Grader], Awaitable[T]]) -> T:
    async def tell(tools: GraderTools) -> T:
        grader = build_grader(spec, tools)
        try:
            await grader.start()
            return await story(grader)
        finally:
            await grader.close()

    return _with_judges(judge, tell)


def _with_judges(judge: list[str] | None, story: Callable[[GraderTools], Awaitable[T]]) -> T:
    configs = dict(_judge(text) for text in judge or [])

    async def tell() -> T:
        judges = Judges(configs)
        try:
            return await story(GraderTools(judges))
        finally:
            await judges.close()

    return asyncio.run(tell())


def _judge(text: str) -> tuple[str, JudgeConfig]:
    model, equals, url = text.partition("=")
    if not equals or not url.startswith(("http://", "https://")):
        raise UserError("--judge has the form MODEL=URL", where=text, cure="e.g. gpt-4o=https://host/v1")
    key = "OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else None
    return model, JudgeConfig(url=url, api_key_env=key)


def _print(table: Table) -> None:
    Console(highlight=False, soft_wrap=not os.isatty(1)).print(table)


def _end(problem: str) -> None:
    typer.echo(problem, err=True)
    raise typer.Exit(1)
