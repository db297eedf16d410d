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

from rft.errors import StorageError, UserError
from rft.live import Live, live_lines
from rft.metrics import stop_shares
from rft.plain import plain
from rft.store import RunStore
from rft.types import Rollout

_NUM_ROWS, _NUM_EVENTS, _NUM_CAUSES = 5, 8, 5
_REFRESH_S = 1.0
_STALE_S = 10.0  # a run that samples writes every second
_MAX_CAUSE = 200  # characters
_UNFINISHED = ("starting", "running")


def open_run(path: Path) -> RunStore:
    """The run in a folder. Raises UserError, which names the runs inside when it is a folder of runs."""
    runs = sorted(config.parent.name for config in path.glob("*/config.json"))
    if runs and not (path / "config.json").exists():
        raise UserError("this is a folder of runs", where=str(path), cure=f"name one: {', '.join(runs[-5:])}")
    return RunStore.open(path)


def find_rollout(store: RunStore, rollout_id: str) -> Rollout:
    """Raises UserError with an id that exists when this one does not."""
    found = store.find(rollout_id)
    if found is None:
        example = next((rollout.id for rollout in store.rollouts()), None)
        cure = f"an id looks like {example}" if example else "the run has no rollouts yet"
        raise UserError("there is no such rollout in this run", where=plain(rollout_id, max_chars=80), cure=cure)
    return found


# --- what is known of a run ---


def summary(store: RunStore) -> dict[str, Any]:
    """One object: state, last rows, how the rollouts of the last step ended, events, and what goes on now."""
    step = max(store.rollout_steps(), default=None)
    rollouts = list(store.rollouts(step)) if step is not None else []
    training, evaluations = _last_rows(store.metrics())
    return {
        "run_id": store.run_id,
        "path": str(store.path),
        "status": status(store),
        "writer_pid": store.writer(),
        "state": store.read_state(),
        "training": training,
        "evaluations": evaluations,
        "last_step": step,
        "stops": _stops(rollouts),
        "discards": _discards(rollouts),
        "events": list(store.events())[-_NUM_EVENTS:],
        "live": store.read_live(),
    }


def status(store: RunStore) -> str:
    """As `RunStore.status` says."""
    return store.status


def _last_rows(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The last training rows, and the last evaluation of each split."""
    training: dict[int, dict[str, Any]] = {}
    evaluations: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("kind") == "training":
            training[row["step"]] = row
        elif row.get("kind") == "evaluation":
            evaluations[row["split"]] = row
    return [training[step] for step in sorted(training)[-_NUM_ROWS:]], list(evaluations.values())


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


def overview(store: RunStore) -> RenderableType:
    """The summary as tables."""
    known = summary(store)
    parts: list[RenderableType] = [_headline(store, known)]
    if known["training"]:
        parts.append(_training_table(known["training"]))
    if known["evaluations"]:
        parts.append(_evaluation_table(known["evaluations"]))
    for split, counts in known["stops"].items():
        ends = ", ".join(f"{reason} {num}" for reason, num in counts.items())
        parts.append(_text(f"step {known['last_step']}, {split} rollouts ended by: {ends}"))
    for cause in known["discards"]:
        parts.append(
            _text(f"  {cause['num']} discarded, {cause['stop_reason']}: {cause['cause']} (e.g. {cause['rollout_id']})")
        )
    if known["events"]:
        parts.append(_text("last events:"))
    parts += [_text(_event_line(event)) for event in known["events"]]
    return Group(*parts)


def _headline(store: RunStore, known: dict[str, Any]) -> Text:
    state = known["state"]
    progress = f", step {state['step']} of {state['steps']} done" if "step" in state else ""
    writer = f" by process {known['writer_pid']}" if known["writer_pid"] is not None else ""
    lines = [f"{known['run_id']}: {known['status']}{writer}{progress}"]
    if known["status"] == "killed":
        lines.append("its process is gone: continue with `rft train CONFIG --resume`")
    if known["status"] == "paused":
        lines.append("continue with `rft train CONFIG --resume`")
    if state.get("error"):
        lines.append("  " + _indented(str(state["error"])))
    return _text("\n".join(lines), style="bold")


def _training_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("step", "grade", "valid calls", "useful groups", "log-prob gap", "seconds", "ended by")
    for row in rows:
        total = row.get("groups/total", 0)
        table.add_row(
            _text(row["step"]),
            _text(_with_interval(row, "train/grade")),
            _text(_number(row.get("train/valid_call_share"))),
            _text(f"{total - row.get('groups/no_signal', 0)}/{total}"),
            _text(_number(row.get("logprob_gap/mean"), digits=5)),
            _text(_number(row.get("time/step_s"), digits=1)),
            _text(_ends(row)),
        )
    return table


def _evaluation_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("split", "step", "grade", "valid calls", "items", "ended by")
    for row in rows:
        table.add_row(
            _text(row["split"]),
            _text(row["step"]),
            _text(_with_interval(row, "grade")),
            _text(_number(row.get("valid_call_share"))),
            _text(row.get("num_items", "-")),
            _text(_ends(row)),
        )
    return table


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("split", "ended by") else "right")
    return table


def _ends(row: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {share:.2f}" for reason, share in stop_shares(row).items()) or "-"


def _with_interval(row: dict[str, Any], name: str) -> str:
    half_width = row.get(f"{name}_ci95")
    return _number(row.get(name)) + (f" ± {half_width:.3f}" if half_width is not None else "")


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _event_line(event: dict[str, Any]) -> str:
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
    return f"  {when} {event.get('level', ''):<5} " + _indented(str(event.get("message", "")))


def _indented(text: str) -> str:
    """Later lines stay below the first: no text can imitate a line of its own."""
    return text.replace("\n", "\n      ")


def _text(value: object, style: str = "") -> Text:
    return Text(plain(str(value), keep="\n"), style=style)


# --- while it runs ---


def live_view(store: RunStore) -> Text:
    """What the run does now; says when that is old or when nobody writes it any more."""
    found, now = status(store), time.time()
    step = store.read_state().get("step")
    lines = [f"{store.run_id}: {found}" + (f", step {step} done" if step is not None else "")]
    live = _read(store)
    if found == "paused":
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
    return _text("\n".join(lines))


def _read(store: RunStore) -> Live | None:
    try:
        return Live.model_validate(found) if (found := store.read_live()) else None
    except ValidationError:
        problem = "live.json is not what this version of rft writes"
        raise StorageError(problem, cure="read the run with the version of rft that writes it") from None


def follow(store: RunStore, console: Console) -> None:
    """Refresh every second until the run ends or the reader interrupts; once, where the output is no terminal."""
    if not console.is_terminal:
        console.print(live_view(store))
        return
    with Screen(live_view(store), console=console, auto_refresh=False) as screen:
        while status(store) in _UNFINISHED:
            time.sleep(_REFRESH_S)  # how often a person wants to see it; nothing is waited for
            screen.update(live_view(store), refresh=True)
