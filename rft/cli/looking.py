"""Commands that look at runs and change nothing: show, doctor."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rft.errors import UserError

app = typer.Typer()


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart-001")],
    live: Annotated[bool, typer.Option("--live", help="what it does now, every second until it ends")] = False,
    rollout: Annotated[str | None, typer.Option(metavar="ID", help="one rollout, readable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Show a run: its state, its last rows, why rollouts ended, what it waits for."""
    from rft import show as view
    from rft.transcript import prompt_of, transcript

    store = view.open_run(run)
    console = Console(highlight=False, soft_wrap=True)
    if rollout is not None:
        if live:
            raise UserError("a finished rollout does not change", where="--live", cure="leave out --live or --rollout")
        found = view.find_rollout(store, rollout)
        prompt = prompt_of(found, store.config())
        as_text = "\n".join(transcript(found, prompt))
        typer.echo(json.dumps({**found.model_dump(), "prompt": prompt}) if as_json else as_text)
    elif as_json:
        typer.echo(json.dumps(view.summary(store)))
    elif live:
        with contextlib.suppress(KeyboardInterrupt):  # how a reader leaves; the run goes on
            view.follow(store, console)
    else:
        console.print(view.overview(store))


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart-001")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Say why a run does not learn, fell or is slow: the causes, the worst first, each with evidence and a cure."""
    from rft.doctor import diagnose
    from rft.doctor.text import told
    from rft.show import open_run

    diagnosis = diagnose(open_run(run))
    if as_json:
        typer.echo(diagnosis.model_dump_json())
    else:
        Console(highlight=False, soft_wrap=True).print(told(diagnosis, run))
