"""The command that asks before any GPU does: plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rft.errors import UserError

app = typer.Typer()


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. model.lora=null")] = None,
    gpus: Annotated[str, typer.Option(help="8x80 (GB), 8xH100, or 2x8xH100 (nodes)")] = "1x80",
    model: Annotated[Path | None, typer.Option(help="a folder with a config.json, instead of model.path")] = None,
    trainer_gpus: Annotated[int | None, typer.Option(min=1, help="how many train; by default the fastest")] = None,
    launch: Annotated[
        Literal["single", "ddp", "deepspeed", "fsdp2"] | None, typer.Option(help="of configs/accelerate")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="of a prompt with its tools, on average")] = None,
    sampled_tokens: Annotated[int | None, typer.Option(min=1, help="of a rollout, all its turns together")] = None,
    result_tokens: Annotated[int | None, typer.Option(min=0, help="that tools answer a rollout, all together")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Will it fit, how fast, and on which GPUs what? Arithmetic alone: needs no GPU and no weights."""
    from rft.config import load_config
    from rft.plan.numbers import make_plan
    from rft.plan.presentation import cure_of, shown
    from rft.tables import new_console

    given = {"prompt": prompt_tokens, "sampled": sampled_tokens, "results": result_tokens}
    found = make_plan(
        load_config(config, overrides),
        gpus,
        model=model,
        trainer_gpus=trainer_gpus,
        launch=launch,
        tokens={name: value for name, value in given.items() if value is not None},
    )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        console = new_console()
        console.print(shown(found, is_boxed=console.is_terminal))
    if not found.fits:
        raise UserError("; ".join(found.problems), where=f"--gpus {found.cluster}", cure=cure_of(found))
