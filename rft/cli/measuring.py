"""Commands that measure a model and train nothing: eval, baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rft.errors import UserError
from rft.types import Split

app = typer.Typer()

_NUM_BASELINE_ITEMS = 32  # 128 rollouts say P(useless group) to about 0.1


@app.command(name="eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. rollout.temperature=1")] = None,
    of: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="a run folder, one of its checkpoints, or best:RUN; without it: the base model"
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="of an OpenAI-compatible server, up to and with /v1")] = None,
    model: Annotated[str | None, typer.Option(help="the model's name at --url")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="the environment variable that holds the key")] = None,
    split: Annotated[Split, typer.Option(help="which rows")] = "test",
    samples: Annotated[int | None, typer.Option(min=1, help="rollouts per item; by default the config's")] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="how many; by default those that a training evaluates")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the newest unfinished one of this name")] = False,
    run_id: Annotated[str | None, typer.Option(help="the run's id: names a new one, or the one to resume")] = None,
) -> None:
    """Measure a model: sample and grade a split, as training does. `rft compare` compares such runs."""
    from rft.config import load_config
    from rft.engines.remote import RemoteConfig
    from rft.evaluation import Extent, run_evaluation, subject_of

    if (url is None) != (model is None) or (url is None and api_key_env is not None):
        cure = "give --url and --model, and --api-key-env where the server needs a key"
        raise UserError("a model behind a URL needs both", where="--url, --model", cure=cure)
    remote = None
    if url is not None and model is not None:
        if not url.startswith(("http://", "https://")):
            raise UserError("must start with http:// or https://", where="--url", cure="e.g. https://host/v1")
        remote = RemoteConfig(url=url, model=model, api_key_env=api_key_env)
        remote.headers()  # a missing key is told before anything is loaded
    parsed = load_config(config, overrides)
    subject = subject_of(parsed, of, remote)
    extent = Extent(split, samples or parsed.evaluation.rollouts_per_item, items)
    run_evaluation(parsed, subject, extent, run_id=run_id, resume=resume)


@app.command()
def baseline(
    config: Annotated[Path, typer.Argument(help="a YAML file, or a run folder that has rollouts")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. rollout.temperature=1")] = None,
    samples: Annotated[int, typer.Option(min=2, help="rollouts per item")] = 4,
    items: Annotated[
        int, typer.Option(min=1, help="how many, in the order a training takes them")
    ] = _NUM_BASELINE_ITEMS,
    split: Annotated[Split | None, typer.Option(help="which rows; train by default, of a run folder its own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the newest unfinished one of this name")] = False,
    run_id: Annotated[str | None, typer.Option(help="the run's id: names a new one, or the one to resume")] = None,
) -> None:
    """Can training work? Sample a task with the untrained model and judge the grades. Trains nothing."""
    from rft.config import load_config

    if config.is_dir():
        if overrides or resume or run_id:
            raise UserError("this folder is only read", where=str(config), cure="give the folder and --split alone")
        _of_folder(config, split, as_json)
        return
    from rft.evaluation import Extent, run_baseline

    extent = Extent(split or "train", samples, items)
    path = run_baseline(load_config(config, overrides), extent, run_id=run_id, resume=resume, to_stderr=as_json)
    if as_json:
        typer.echo((path / "baseline.json").read_text(encoding="utf-8"), nl=False)


def _of_folder(path: Path, split: Split | None, as_json: bool) -> None:
    from rft.baseline.numbers import baseline_of
    from rft.baseline.presentation import table, write_baseline
    from rft.show import open_run
    from rft.tables import new_console

    store = open_run(path)
    found = baseline_of(store, split)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        console = new_console()
        console.print(table(found, is_boxed=console.is_terminal))
    write_baseline(store, found)  # last: a folder that only may be read is still told of
    if not as_json:
        typer.echo(f"baseline: {path / 'baseline.json'} and baseline.png")
