"""Commands that look at runs and change nothing in them: show, doctor, compare, report."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from rft.errors import UserError
from rft.types import Split

app = typer.Typer()


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart-001")],
    rollout_id: Annotated[str | None, typer.Argument(metavar="[ROLLOUT]", help="one rollout, readable")] = None,
    live: Annotated[bool, typer.Option("--live", help="what it does now, every second until it ends")] = False,
    rollout: Annotated[str | None, typer.Option("--rollout", metavar="ID", help="the same as ROLLOUT")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Show a run: its state, its last rows, why rollouts ended, what it waits for. Or one of its rollouts."""
    from rft import show as view
    from rft.salvage import config_and_state
    from rft.tables import new_console
    from rft.transcript import as_text, prompt_of, transcript

    store = view.open_run(run)
    console = new_console()
    if rollout_id and rollout and rollout_id != rollout:
        raise UserError("two rollouts are named", where="--rollout", cure="leave out one of them")
    if wanted := rollout_id or rollout:
        if live:
            raise UserError(
                "a finished rollout does not change", where="--live", cure="leave out --live or the rollout"
            )
        found = view.find_rollout(store, wanted)
        prompt = prompt_of(found, store, config_and_state(store)[0])
        if as_json:
            typer.echo(json.dumps({**found.model_dump(), "prompt": prompt}))
        elif console.is_terminal:
            console.print(as_text(transcript(found, prompt)), end="")
        else:
            typer.echo("\n".join(transcript(found, prompt)))
    elif as_json:
        typer.echo(json.dumps(view.summary(store)))
    elif live:
        with contextlib.suppress(KeyboardInterrupt):  # how a reader leaves; the run goes on
            view.follow(store, console)
    else:
        console.print(view.overview(store, is_boxed=console.is_terminal))


@app.command()
def compare(
    sides: Annotated[
        list[str],
        typer.Argument(metavar="RUN[@STEP|@first|@last|@best]...", help="alone: its first and last evaluation"),
    ],
    split: Annotated[Split | None, typer.Option(help="by default what all have: test, else validation")] = None,
    pass_at: Annotated[float | None, typer.Option(help="the grade with which a rollout passes")] = None,
    slow_s: Annotated[float | None, typer.Option(help="seconds above which a rollout is slow")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write compare.json, .png and .html there")] = None,
) -> None:
    """Compare evaluations item by item: what changed, how surely, where."""
    from rft.compare.comparison import compare as compared
    from rft.compare.page import to_json, write_comparison
    from rft.compare.sides import find_sides
    from rft.compare.tables import tables
    from rft.tables import new_console

    comparison = compared(find_sides(sides, split), pass_at=pass_at, slow_s=slow_s)
    written = write_comparison(comparison, out) if out is not None else []
    if as_json:
        typer.echo(to_json(comparison), nl=False)
        return
    console = new_console()
    for part in tables(comparison, is_boxed=console.is_terminal):
        console.print(part)
    for path in written:
        typer.echo(f"written: {path}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="by default report.html in the run folder")] = None,
) -> None:
    """Write one self-contained HTML file about a run, for a colleague without access to it."""
    from rft.report.page import write_page
    from rft.show import open_run

    store = open_run(run)
    typer.echo(f"written: {write_page(store, out or store.path / 'report.html')}")


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart-001")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Say why a run does not learn, fell or is slow: the causes, the worst first, each with evidence and a cure."""
    from rft.doctor import diagnose
    from rft.doctor.text import told
    from rft.show import open_run
    from rft.tables import new_console

    diagnosis = diagnose(open_run(run))
    if as_json:
        typer.echo(diagnosis.model_dump_json())
    else:
        new_console().print(told(diagnosis, run))
