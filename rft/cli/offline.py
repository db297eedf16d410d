"""The command for machines without a network: bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def bundle(
    out: Annotated[Path, typer.Argument(help="a folder that does not exist yet, or a bundle to go on with")],
    target: Annotated[str, typer.Option(help="cpu or cuda: what the other machine has")],
    python: Annotated[str | None, typer.Option(help="the other machine's, e.g. 3.11; by default this one's")] = None,
    glibc: Annotated[str, typer.Option(help="the other machine's, or an older one; `ldd --version` says it")] = "2.31",
    model: Annotated[list[Path] | None, typer.Option(help="a model folder to carry; may be repeated")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="a JSONL file or a folder; may be repeated")] = None,
) -> None:
    """Write one folder that installs rft without a network, by its `install`; run it again to go on."""
    from rft.bundle.making import make, take_order
    from rft.bundle.target import parse_target

    order = take_order(out, parse_target(target, python, glibc), model or [], data or [])
    facts = make(order, lambda text: typer.echo(f"bundle: {text}"))
    needs = ".".join(map(str, facts.needs_glibc))
    typer.echo(f"{out} is complete: for {facts.machine}, Python {facts.python}, glibc {needs} or newer")
    typer.echo("carry the whole folder to the other machine, and run ./install [FOLDER] in it")
