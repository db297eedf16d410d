"""Commands for several machines: submit, engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. training.steps=2")] = None,
    nodes: Annotated[int, typer.Option(help="machines in all")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="0: on CPUs")] = 0,
    engine_nodes: Annotated[int, typer.Option(help="of the nodes, how many only run vLLM servers")] = 0,
    gpus_per_engine: Annotated[int, typer.Option(help="tensor parallelism of each of those servers")] = 1,
    time: Annotated[
        str | None, typer.Option(help="the time limit, e.g. 8:00:00; the run goes on in further ones")
    ] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    slurm: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="any other option of sbatch")] = None,
    port: Annotated[int, typer.Option(help="the first port that nodes use for each other; 0: any free ones")] = 0,
    notice_s: Annotated[int, typer.Option(help="seconds before the time limit in which the run saves")] = 120,
    launch_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="of configs/accelerate/, e.g. fsdp2.yaml")
    ] = None,
    run_id: Annotated[str | None, typer.Option(help="the run's id: names a new run, or the one to resume")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the newest unfinished run of this name")] = False,
    warmup: Annotated[bool, typer.Option("--warmup", help="`rft warmup` instead of `rft train`, on one node")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="follow the job and end as it ends; ending this command cancels the job")
    ] = False,
) -> None:
    """Train as a job of Slurm. It saves and goes on by itself when it is preempted or its time is up."""
    from rft.cluster.allocation import parse_allocation, parse_options
    from rft.cluster.following import follow
    from rft.cluster.submission import spare_torch
    from rft.cluster.submission import submit as queue_run
    from rft.config import load_config

    asked = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "engine_nodes": engine_nodes,
        "gpus_per_engine": gpus_per_engine,
        "time": time,
        "partition": partition,
        "account": account,
        "slurm": parse_options(slurm or []),
        "port": port,
        "notice_s": notice_s,
        "launch_config": launch_config,
    }
    allocation = parse_allocation(asked)
    spare_torch()
    found = queue_run(
        load_config(config, overrides), allocation, "warmup" if warmup else "train", run_id=run_id, resume=resume
    )
    typer.echo(f"run folder: {found.run}")
    typer.echo(f"Slurm job {found.job_id}" + ("" if found.is_new else " is still active: it was not submitted again"))
    if wait:
        raise typer.Exit(follow(found.run, found.job_id, typer.echo))
    typer.echo(f"`rft show {found.run}` follows it, `scancel {found.job_id}` ends it")


@app.command()
def engine(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    host: Annotated[str, typer.Option(help="an address of this machine; whoever reaches it controls the server")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 lets the system choose")] = 8010,
    log: Annotated[Path, typer.Option(metavar="FILE", help="where vLLM's own words go")] = Path("engine.log"),
) -> None:
    """Serve the config's model with vLLM, for the engine.url of runs on other machines; until it is interrupted."""
    import asyncio
    import contextlib

    from rft.config import load_config
    from rft.engines.serving import serve
    from rft.listener import bound

    parsed = load_config(config, overrides)
    with bound(host, port) as listener:  # a port that is taken is said before anything starts
        address = (host, int(listener.getsockname()[1]))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parsed, address, log, lambda url: typer.echo(f"serving {url}: engine.url={url}")))
