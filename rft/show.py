"""`rft show`: what a run is and was doing, from its folder alone. Reads while the run writes; takes no lock.

Everything that a model, a tool, a dataset or a server wrote is shown with its control characters as codes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from rft.cluster import queue
from rft.curves import curve_lines, grade_curves
from rft.errors import StorageError, UserError
from rft.live import Live, live_lines
from rft.metrics import stop_shares
from rft.plain import plain
from rft.salvage import Salvage, config_and_state, metric_rows, number, salvaged
from rft.store import RunStore
from rft.tables import cell, new_table
from rft.types import Rollout

_NUM_ROWS, _NUM_EVENTS, _NUM_CAUSES = 5, 8, 5
_REFRESH_S = 1.0
_STALE_S = 10.0  # a run that samples writes every second
_MAX_CAUSE = 200  # characters
_UNFINISHED = ("starting", "running")
_FOLLOWED = ("queued", *_UNFINISHED)
_LEFT = ("split", "ended by")  # columns of words


def open_run(path: Path) -> RunStore:
    """The run in a folder. Raises UserError, which names the runs inside when it is a folder of runs."""
    runs = sorted(config.parent.name for config in path.glob("*/config.json"))
    if runs and not (path / "config.json").exists():
        raise UserError("this is a folder of runs", where=str(path), cure=f"name one: {', '.join(runs[-5:])}")
    return RunStore.open(path)


def find_rollout(store: RunStore, rollout_id: str) -> Rollout:
    """Raises UserError with an id that exists when this one does not, StorageError when it cannot be read."""
    try:
        found = store.find(rollout_id)
    except StorageError:  # of another version of rft: as much of it as this one knows
        read = (rollout for step in store.rollout_steps() for rollout in salvaged(store, step).rollouts)
        found = next((rollout for rollout in read if rollout.id == rollout_id), None)
        if found is None:
            raise
    if found is None:
        steps = store.rollout_steps()[:1]
        example = next((rollout.id for step in steps for rollout in salvaged(store, step).rollouts), None)
        cure = f"an id looks like {example}" if example else "the run has no rollouts yet"
        raise UserError("there is no such rollout in this run", where=plain(rollout_id, max_chars=80), cure=cure)
    return found


# --- what is known of a run ---


def summary(store: RunStore) -> dict[str, Any]:
    """One object: state, last rows, how the rollouts of the last step ended, events, and what goes on now."""
    step = max(store.rollout_steps(), default=None)
    read = salvaged(store, step) if step is not None else Salvage([], [])
    _, state, problems = config_and_state(store)
    training, evaluations = metric_rows(store, "training"), metric_rows(store, "evaluation")
    return {
        "run_id": store.run_id,
        "path": str(store.path),
        "status": status(store),
        "writer_pid": store.writer(),
        "slurm": _slurm(store),
        "state": state,
        "training": training[-_NUM_ROWS:],
        "evaluations": list({row["split"]: row for row in evaluations}.values()),  # the last of each
        "grades": grade_curves(training, evaluations),
        "last_step": step,
        "stops": _stops(read.rollouts),
        "discards": _discards(read.rollouts),
        "events": list(store.events())[-_NUM_EVENTS:],
        "live": store.read_live(),
        "problems": [*problems, *read.problems],
    }


def status(store: RunStore) -> str:
    """The state's status; `killed` when that is unfinished and nobody writes the run, `queued` when Slurm has it."""
    try:
        return queue.status_of(store.path, store.status)
    except StorageError:  # state.json cannot be read, which `summary` says
        return "unknown"


def _slurm(store: RunStore) -> dict[str, Any] | None:
    """The job of a submitted run, and what Slurm says of it; null where it cannot be asked."""
    job = queue.job_of(store.path)
    if job is None:
        return None
    found = queue.look(store.path)
    return {"job_id": job["job_id"], "state": found.told() if found is not None else None}


def _stops(rollouts: list[Rollout]) -> dict[str, dict[str, int]]:
    """Split -> stop reason -> how many."""
    found: dict[str, Counter[str]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.split, Counter())[rollout.stop_reason.value] += 1
    return {split: dict(counts.most_common()) for split, counts in found.items()}


def _discards(rollouts: list[Rollout]) -> list[dict[str, Any]]:
    """The causes of discards, the most frequent first, each with one rollout."""
    causes: dict[tuple[str, str], list[str]] = {}
    for rollout in rollouts:
        if rollout.stop_reason.is_discarded:
            cause = (rollout.error or "").partition("\n")[0][:_MAX_CAUSE]
            causes.setdefault((rollout.stop_reason.value, cause), []).append(rollout.id)
    ordered = sorted(causes.items(), key=lambda entry: -len(entry[1]))[:_NUM_CAUSES]
    return [
        {"stop_reason": reason, "cause": cause, "num": len(ids), "rollout_id": ids[0]}
        for (reason, cause), ids in ordered
    ]


# --- as a person reads it ---


def overview(store: RunStore, *, is_boxed: bool = True) -> RenderableType:
    """The summary as tables; is_boxed: with lines around the cells."""
    known = summary(store)
    parts: list[RenderableType] = [_headline(store, known)]
    parts += [cell(f"not all could be read: {problem}", style="yellow") for problem in known["problems"]]
    parts += [cell(line) for line in curve_lines(known["grades"])]
    if known["training"]:
        parts.append(_training_table(known["training"], is_boxed))
    if known["evaluations"]:
        parts.append(_evaluation_table(known["evaluations"], is_boxed))
    for split, counts in known["stops"].items():
        ends = ", ".join(f"{reason} {num}" for reason, num in counts.items())
        parts.append(cell(f"step {known['last_step']}, {split} rollouts ended by: {ends}"))
    for cause in known["discards"]:
        parts.append(
            cell(f"  {cause['num']} discarded, {cause['stop_reason']}: {cause['cause']} (e.g. {cause['rollout_id']})")
        )
    if known["events"]:
        parts.append(cell("last events:"))
    parts += [cell(_event_line(event)) for event in known["events"]]
    return Group(*parts)


def _headline(store: RunStore, known: dict[str, Any]) -> Text:
    state = known["state"]
    progress = f", step {state['step']} of {state['steps']} done" if {"step", "steps"} <= state.keys() else ""
    writer = f" by process {known['writer_pid']}" if known["writer_pid"] is not None else ""
    lines = [f"{known['run_id']}: {known['status']}{writer}{progress}"]
    if (job := known["slurm"]) is not None:
        lines.append(f"Slurm job {job['job_id']}" + (f": {job['state']}" if job["state"] else ""))
    if known["status"] == "killed":
        lines.append("its process is gone: continue with `rft train CONFIG --resume`")
    if known["status"] == "paused":
        lines.append("continue with `rft train CONFIG --resume`")
    if state.get("error"):
        lines.append("  " + _indented(str(state["error"])))
    return cell("\n".join(lines), style="bold")


def _training_table(rows: list[dict[str, Any]], is_boxed: bool) -> Table:
    headings = "step,grade,valid calls,tool calls,tokens,useful groups,log-prob gap,seconds,ended by"
    table = new_table(*headings.split(","), left=_LEFT, is_boxed=is_boxed)
    for row in rows:
        total, without = (number(row, name) or 0 for name in ("groups/total", "groups/no_signal"))
        table.add_row(
            cell(row["step"]),
            cell(_with_interval(row, "train/grade")),
            cell(_number(row, "train/valid_call_share")),
            cell(_number(row, "train/tool_calls", digits=2)),
            cell(_number(row, "train/sampled_tokens", digits=0)),
            cell(f"{total - without:.0f}/{total:.0f}"),
            cell(_number(row, "logprob_gap/mean", digits=5)),
            cell(_number(row, "time/step_s", digits=1)),
            cell(_ends(row)),
        )
    return table


def _evaluation_table(rows: list[dict[str, Any]], is_boxed: bool) -> Table:
    headings = "split,step,grade,valid calls,tool calls,tokens,items,ended by"
    table = new_table(*headings.split(","), left=_LEFT, is_boxed=is_boxed)
    for row in rows:
        table.add_row(
            cell(row["split"]),
            cell(row["step"]),
            cell(_with_interval(row, "grade")),
            cell(_number(row, "valid_call_share")),
            cell(_number(row, "tool_calls", digits=2)),
            cell(_number(row, "sampled_tokens", digits=0)),
            cell(row.get("num_items", "-")),
            cell(_ends(row)),
        )
    return table


def _ends(row: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {share:.2f}" for reason, share in stop_shares(row).items()) or "-"


def _with_interval(row: dict[str, Any], name: str) -> str:
    half_width = number(row, f"{name}_ci95")
    return _number(row, name) + (f" ± {half_width:.3f}" if half_width is not None else "")


def _number(row: dict[str, Any], name: str, digits: int = 3) -> str:
    value = number(row, name)
    return "-" if value is None else f"{value:.{digits}f}"


def _event_line(event: dict[str, Any]) -> str:
    try:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(number(event, "time")))
    except (OverflowError, ValueError, OSError):  # no time that this machine knows
        when = "-"
    return f"  {when} {event.get('level', '')!s:<5} " + _indented(str(event.get("message", "")))


def _indented(text: str) -> str:
    """Later lines stay below the first: no text can imitate a line of its own."""
    return text.replace("\n", "\n      ")


# --- while it runs ---


def live_view(store: RunStore, curves: Iterable[str] = ()) -> Text:
    """What the run does now; says when that is old or when nobody writes it any more. curves: lines that go first."""
    found, now = status(store), time.time()
    step = store.read_state().get("step")
    lines = [f"{store.run_id}: {found}" + (f", step {step} done" if step is not None else ""), *curves]
    live = _read(store)
    if found == "queued":
        job = queue.look(store.path)
        lines.append(f"it waits for Slurm{f': {job.told()}' if job is not None else ''}")
    elif found == "paused":
        lines.append("its process has ended: `rft train CONFIG --resume` continues it")
    elif found not in (*_UNFINISHED, "killed"):
        lines.append("it is over: `rft show` without --live says how it went")
    elif live is None:
        lines.append("nothing was sampled yet")
    else:
        age_s = now - live.time
        lines += live_lines(live)
        if found == "killed":
            lines.append(f"the process {live.pid} is gone; this is what it said {age_s:,.0f} s before now")
        elif found in _UNFINISHED and live.is_active and age_s > _STALE_S:
            lines.append(f"this is {age_s:,.0f} s old: the process stands still; `kill -USR1 {live.pid}` asks it why")
        elif found in _UNFINISHED and not live.is_active:
            lines.append(f"for {age_s:,.0f} s it has not sampled: it trains, or saves")
    return cell("\n".join(lines))


def _read(store: RunStore) -> Live | None:
    try:
        return Live.model_validate(found) if (found := store.read_live()) else None
    except ValidationError:
        problem = "live.json is not what this version of rft writes"
        raise StorageError(problem, cure="read the run with the version of rft that writes it") from None


def follow(store: RunStore, console: Console) -> None:
    """Refresh every second until the run ends or the reader interrupts; once, where the output is no terminal."""
    curves = _Curves(store)
    if not console.is_terminal:
        console.print(live_view(store, curves.lines()))
        return
    with Screen(live_view(store, curves.lines()), console=console, auto_refresh=False) as screen:
        while status(store) in _FOLLOWED:
            time.sleep(_REFRESH_S)  # how often a person wants to see it; nothing is waited for
            screen.update(live_view(store, curves.lines()), refresh=True)


class _Curves:
    """The lines of the grades; the metrics of a long run are read again only when there are more of them."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._size = -1
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        path = self._store.path / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size != self._size:
            rows = (metric_rows(self._store, kind) for kind in ("training", "evaluation"))
            self._size, self._lines = size, list(curve_lines(grade_curves(*rows)))
        return self._lines
