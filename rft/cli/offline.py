"""Commands for machines without a network: bundle, check-offline."""

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


@app.command()
def check_offline(
    config: Annotated[Path, typer.Argument(help="a YAML file")] = Path("configs/quickstart.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. model.path=models/mine")] = None,
    limit_s: Annotated[float, typer.Option(min=1, help="seconds the short training may take")] = 1800,
) -> None:
    """Prove that nothing reaches out: train one short step where only loopback exists. Exits 1 if anything tried."""
    from rft.offline.checking import check

    proof = check(config, overrides or [], limit_s, lambda text: typer.echo(f"check-offline: {text}"))
    watched = "every process" if proof.sees_all else "Python processes alone (the kernel refuses more)"
    if proof.exit_code != 0:
        typer.echo("\n".join(["the training failed; its last words:", *proof.tail]))
    for attempt, count in proof.attempts.most_common():
        typer.echo(attempt.in_words() + (f"  ({count} times)" if count > 1 else ""))
    if proof.exit_code != 0 or proof.attempts:
        verdict = "the training ended well" if proof.exit_code == 0 else f"the training ended with {proof.exit_code}"
        typer.echo(f"not offline: {verdict}, {len(proof.attempts)} things elsewhere were tried; watched: {watched}")
        raise typer.Exit(1)
    typer.echo(f"offline: the training ended well and nothing else was tried; watched: {watched}")
