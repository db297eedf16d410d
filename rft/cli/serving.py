"""Commands that serve until they are interrupted: tools, serve, ui."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@contextmanager
def _to_the_end() -> Iterator[None]:
    """An interruption is how a server ends: nothing went wrong."""
    with suppress(KeyboardInterrupt):
        yield


@app.command()
def tools(
    task: Annotated[str, typer.Argument(help="a task of rft.envs.tasks, or package.module:NAME")],
    port: Annotated[int, typer.Option(help="0 lets the system choose")] = 8765,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
) -> None:
    """Serve a Python task's tools over HTTP under the Agent RFT contract."""
    from rft.envs.serve import serve
    from rft.envs.tasks import load_task

    with _to_the_end():
        serve(load_task(task), host, port)


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/server.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. port=8001")] = None,
    create_key: Annotated[bool, typer.Option("--create-key", help="make an API key, print it, and end")] = False,
    project: Annotated[str, typer.Option(help="with --create-key: whose key it is")] = "proj_default",
    is_admin: Annotated[
        bool, typer.Option("--admin", help="with --create-key: it may give projects access to checkpoints")
    ] = False,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="serve without keys, on loopback only")] = False,
) -> None:
    """Serve OpenAI's fine-tuning API: existing code needs OPENAI_BASE_URL and a key, and nothing else."""
    from rft.server import serve as server
    from rft.server.settings import load_server_config

    parsed = load_server_config(config, overrides)
    if create_key:
        typer.echo(server.create_key(parsed, project, is_admin=is_admin))
        return
    with _to_the_end():
        server.serve(parsed, has_auth=not no_auth, on_ready=_announce)


def _announce(url: str) -> None:
    typer.echo(f"serving {url}/v1\nthe page: {url}/ui/")


@app.command()
def ui(
    runs: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="a folder of runs, or one run")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 lets the system choose")] = 8001,
    host: Annotated[str, typer.Option(help="a loopback address: the page has no keys")] = "127.0.0.1",
) -> None:
    """Show runs in a browser: charts, rollouts, traces, graders to try out. Needs no server and no keys."""
    from rft.ui import serve as page

    with _to_the_end():
        page.serve(runs, host, port, on_ready=lambda url: typer.echo(f"serving {url}"))
