"""Commands that train a model, or do what comes before and after: train, sample, warmup, pause, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rft.errors import UserError

app = typer.Typer()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. training.steps=2")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the newest unfinished run of this name")] = False,
    run_id: Annotated[str | None, typer.Option(help="the run's id: names a new run, or the one to resume")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="train on the rollouts that this run folder holds, without sampling")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="start from the weights of this run folder, or of one of its checkpoints")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="with --resume: go on from this one, e.g. step_000004, not from the newest")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="end before the first update where no group of step 1 has signal")
    ] = False,
) -> None:
    """Train. `accelerate launch -m rft train CONFIG` is the same on many processes."""
    from rft.config import load_config
    from rft.job import run_job

    start = [f"model.init_from={json.dumps(str(init_from))}"] if init_from is not None else []
    parsed = load_config(config, [*(overrides or []), *start])
    run_job(parsed, run_id=run_id, resume=resume, replay=replay, checkpoint=checkpoint, is_strict=strict)


@app.command()
def sample(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. training.steps=2")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the newest unfinished run of this name")] = False,
    run_id: Annotated[str | None, typer.Option(help="the run's id: names a new run, or the one to resume")] = None,
) -> None:
    """Sample the rollouts of `training.steps` steps with the untrained model: for `rft train --replay`, or to look."""
    from rft.config import load_config
    from rft.job import run_sampling

    run_sampling(load_config(config, overrides), run_id=run_id, resume=resume)


@app.command()
def warmup(
    config: Annotated[Path, typer.Argument(help="a YAML file with a section warmup")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. warmup.demonstrations=shown.jsonl")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="do one that was interrupted again, in its folder")] = False,
    run_id: Annotated[str | None, typer.Option(help="the run's id: names a new run, or the one to resume")] = None,
) -> None:
    """Train on demonstrations first: for a model that never succeeds, and so never gets a reward to learn from."""
    from rft.config import load_config
    from rft.job import run_warmup

    typer.echo(f"warmed up: {run_warmup(load_config(config, overrides), run_id=run_id, resume=resume)}")


@app.command()
def pause(run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart-001")]) -> None:
    """Let a run finish its step, save a checkpoint and end; `rft train CONFIG --resume` continues it."""
    from rft.show import open_run, status

    store = open_run(run)
    found = status(store)
    if not store.is_written or found not in ("starting", "running"):
        raise UserError(f"this run is {found}, nobody trains it now", where=str(run), cure="there is nothing to pause")
    store.ask_to_pause()
    typer.echo(f"{store.run_id} pauses after the step it is in")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart-001")],
    out: Annotated[Path, typer.Argument(help="the model folder to write")],
    checkpoint: Annotated[
        str, typer.Option(help="`last`, `best` (validation) or a step's name, e.g. step_000012")
    ] = "last",
) -> None:
    """Write a run's model, adapters merged into their base: a folder that transformers and vLLM load."""
    from rft.export import export as export_model

    typer.echo(f"wrote {export_model(run, out, checkpoint)}")
