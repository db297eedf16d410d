"""The `rft` command. Prints results and one clear message per error; exit codes: 1 world, 2 user, 130 interrupted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from rft.errors import RftError, StorageError, UserError
from rft.files import replace
from rft.grade_cli import app as grade_app

_INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(grade_app, name="grade")


@app.callback()
def _root() -> None:
    """Train an agent's model on its own tools and graders."""


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
) -> None:
    """Train. `accelerate launch -m rft train CONFIG` is the same on many processes."""
    from rft.config import load_config
    from rft.job import run_job

    start = [f"model.init_from={json.dumps(str(init_from))}"] if init_from is not None else []
    parsed = load_config(config, [*(overrides or []), *start])
    run_job(parsed, run_id=run_id, resume=resume, replay=replay, checkpoint=checkpoint)


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
def tools(
    task: Annotated[str, typer.Argument(help="a task of rft.envs.tasks, or package.module:NAME")],
    port: Annotated[int, typer.Option(help="0 lets the system choose")] = 8765,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
) -> None:
    """Serve a Python task's tools over HTTP under the Agent RFT contract."""
    from rft.envs.serve import serve
    from rft.envs.tasks import load_task

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
    server.serve(parsed, has_auth=not no_auth, on_ready=lambda url: typer.echo(f"serving {url}"))


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


@app.command()
def pause(run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart-001")]) -> None:
    """Let a run finish its step, save a checkpoint and end; `rft train CONFIG --resume` continues it."""
    from rft.show import open_run, status

    store = open_run(run)
    found = status(store)
    if store.writer() is None or found not in ("starting", "running"):
        raise UserError(f"this run is {found}, nobody trains it now", where=str(run), cure="there is nothing to pause")
    store.ask_to_pause()
    typer.echo(f"{store.run_id} pauses after the step it is in")


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


def main() -> None:
    """Run the CLI; every expected failure becomes one message and an exit code, never a traceback."""
    ending = os.environ.pop("RFT_ENDING", None)
    _end_on_sigterm()
    signal.signal(signal.SIGUSR1, lambda *_: None)  # asks a run what it is doing (rft/watch.py); must never end one
    try:
        code = app(standalone_mode=False)  # typer returns the code of an exit, 130 for a Ctrl-C
    except RftError as error:
        _tell_ending(ending, error)
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"the disk is full: {error.filename or os.getcwd()}\n  cure: free space, then --resume"
        _tell_ending(ending, StorageError(text))
        _fail(text, 1)
    except Exception as error:  # click's usage errors, which are not public through typer
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)
    if code == _INTERRUPTED:
        _fail("interrupted; nothing written is lost: train and sample continue with --resume", code)
    sys.exit(code or 0)


def _end_on_sigterm() -> None:
    """End as a Ctrl-C does, which the event loop turns into a cancellation; also where SIGINT is ignored (`rft &`)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    else:
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {text}", style="red", markup=False)
    sys.exit(code)


def _tell_ending(path: str | None, error: RftError) -> None:
    """Write the error where RFT_ENDING says: launchers between us and who started us lose exit codes."""
    if path is not None:
        where = error.where if isinstance(error, UserError) else ""
        told = {"kind": type(error).__name__, "where": where, "error": str(error)}
        with contextlib.suppress(StorageError):  # then whoever started us sees an end without a reason
            replace(Path(path), json.dumps(told).encode())
