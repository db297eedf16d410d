"""The report as one HTML file for a colleague who has neither the run nor rft. Holds no secrets of the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from rft import __version__
from rft.doctor import diagnose
from rft.files import replace
from rft.html import figure, render
from rft.redaction import without_any_secret
from rft.report.examples import examples
from rft.report.figure import Row, label_of, panels
from rft.report.numbers import PHASES, cell_of, evaluation_rows, report_of, stop_cells
from rft.salvage import config_and_state, metric_rows, number, salvaged
from rft.show import status
from rft.store import RunStore
from rft.transcript import prompt_of
from rft.types import Split

_NUM_EVENTS = 20
_MAX_TURNS, _MAX_CALLS = 20, 10  # of an example


def write_page(store: RunStore, path: Path) -> Path:
    """Write the report there. Raises StorageError."""
    return replace(path, page(store).encode())


def page(store: RunStore) -> str:
    """The HTML file, from the run folder as it is now."""
    config, state, problems = config_and_state(store)
    report = report_of(store)
    training, evaluations = metric_rows(store, "training"), evaluation_rows(store)
    return render(
        "report.html",
        title=store.run_id,
        version=__version__,
        status=status(store) if not problems else "unknown",
        error=state.get("error"),
        problems=[*problems, *_unread(store, report)],
        lead=_lead(report),
        tiles=_tiles(report, training, evaluations),
        facts=_facts(config),
        splits=report["splits"],
        figures=[figure(element) for element in panels(training, evaluations)],
        diagnosis=diagnose(store),
        examples=examples(store),
        prompt_of=lambda rollout: prompt_of(rollout, store, config),
        max_turns=_MAX_TURNS,
        max_calls=_MAX_CALLS,
        costs=_costs(report, training, evaluations),
        events=[event for event in store.events() if event.get("level") in ("warn", "error")][-_NUM_EVENTS:],
        config=[
            (name, json.dumps(value, indent=2, ensure_ascii=False))
            for name, value in without_any_secret(config).items()
        ],
        label_of=label_of,
        cell_of=cell_of,
        stop_cells=stop_cells,
    )


def _unread(store: RunStore, report: dict[str, Any]) -> list[str]:
    """What of the evaluations before and after could not be read."""
    compared = report["splits"].values()
    steps = sorted({one[key] for one in compared for key in ("before_step", "after_step")})
    return [problem for step in steps for problem in salvaged(store, step).problems]


def _lead(report: dict[str, Any]) -> str:
    """What came of it, in one sentence."""
    split, compared = next(iter(report["splits"].items()), (None, None))
    if compared is None:
        return f"{report['steps']} steps of training; no split was evaluated."
    grade = compared["measures"].get("grade", {})
    before, after, change = (cell_of(grade, key) for key in ("before", "after", "change"))
    if grade.get("after") is None:
        return f"The grade on the {split} split is {before} ({compared['num_items']} items)."
    text = f"After {report['steps']} steps the grade on the {split} split went from {before} to {after}"
    by_item = f", a change of {change} taken item by item" if grade.get("change") is not None else ""
    return f"{text}{by_item} ({compared['num_items']} items, 95% intervals)."


def _tiles(report: dict[str, Any], training: list[Row], evaluations: dict[str, list[Row]]) -> list[tuple[str, str]]:
    """The numbers a reader looks for first, with what they are."""
    tiles = []
    for split, compared in report["splits"].items():
        steps = dict.fromkeys((compared["before_step"], compared["after_step"]))
        rows = [row for row in evaluations[split] if row["step"] in steps and number(row, "grade") is not None]
        tiles += [(f"{row['grade']:.3f}", f"grade on {split}, step {row['step']}") for row in rows]
    return [
        *tiles,
        (f"{report['steps']}", "steps"),
        (f"{_total(training, 'train/num_rollouts'):,.0f}", "rollouts trained on"),
        (_duration(report["seconds"]["step"]), "training steps took"),
    ]


def _facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was, from its config; what an older or newer one lacks is left out."""
    adapter = _at(config, "model.lora")
    tools = [str(tool.get("name")) for tool in _listed(config, "environment.tools") if isinstance(tool, dict)]
    threshold = _at(config, "grader.pass_threshold")
    shadows = _at(config, "shadow_graders")
    facts = {
        "model": [_at(config, "model.path"), _at(config, "model.dtype")],
        "trained": [f"LoRA of rank {adapter.get('rank')}" if isinstance(adapter, dict) else "all weights"],
        "started from": [_at(config, "model.init_from")],
        "data": [f"{split}: {path}" for split in get_args(Split) if (path := _at(config, f"data.{split}"))],
        "environment": [_at(config, "environment.type"), f"tools {', '.join(tools)}" if tools else None],
        "grader": [
            _at(config, "grader.name"),
            _at(config, "grader.type"),
            None if threshold is None else f"passes at {threshold}",
        ],
        "shadow graders": list(shadows) if isinstance(shadows, dict) else [],
        "step": [
            _counted(config, "training.items_per_step", "items"),
            _counted(config, "training.base_rollouts", "rollouts per item"),
            _counted(config, "rollout.max_turns", "turns at most"),
        ],
        "update": [
            _at(config, "training.loss"),
            _labelled(config, "training.learning_rate", "learning rate"),
            _labelled(config, "rollout.temperature", "temperature"),
            _labelled(config, "seed", "seed"),
        ],
        "engine": [_at(config, "engine.type")],
    }
    told = {name: ", ".join(str(part) for part in parts if part is not None) for name, parts in facts.items()}
    return [(name, text) for name, text in told.items() if text]


def _at(config: dict[str, Any], place: str) -> Any:
    """The value at `section.key`, None where there is none."""
    value: Any = config
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _listed(config: dict[str, Any], place: str) -> list[Any]:
    value = _at(config, place)
    return value if isinstance(value, list) else []


def _counted(config: dict[str, Any], place: str, what: str) -> str | None:
    value = _at(config, place)
    return None if value is None else f"{value} {what}"


def _labelled(config: dict[str, Any], place: str, name: str) -> str | None:
    value = _at(config, place)
    return None if value is None else f"{name} {value}"


def _costs(report: dict[str, Any], training: list[Row], evaluations: dict[str, list[Row]]) -> list[tuple[str, str]]:
    """Time and tokens, as lines of a table."""
    evaluated = [row for rows in evaluations.values() for row in rows]
    seconds = {name: report["seconds"][name] for name in PHASES}
    judged = [
        _total(training, f"train/grader/{kind}_tokens") + _total(evaluated, f"grader/{kind}_tokens")
        for kind in ("prompt", "completion")
    ]
    costs = [
        ("all steps", _duration(seconds["step"])),
        *((f"of them {name}", _duration(seconds[name])) for name in PHASES if name != "step"),
        ("evaluations", _duration(_total(evaluated, "seconds"))),
        ("tokens sampled in training", f"{_total(training, 'train/num_sampled_tokens'):,.0f}"),
        ("tokens sampled in evaluations", f"{_total(evaluated, 'num_sampled_tokens'):,.0f}"),
        ("prompt tokens, each counted once", f"{_total(training, 'train/num_prompt_tokens'):,.0f} in training"),
        ("rollouts discarded", f"{_total(training, 'train/num_discarded') + _total(evaluated, 'num_discarded'):,.0f}"),
    ]
    return [*costs, ("tokens of judges", f"{judged[0]:,.0f} read, {judged[1]:,.0f} written")] if any(judged) else costs


def _total(rows: list[Row], name: str) -> float:
    return sum(number(row, name) or 0.0 for row in rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
