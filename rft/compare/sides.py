"""One side of a comparison: the rollouts of one evaluation, found from what a person writes.

`RUN` is its last evaluation, `RUN@first`, `RUN@12`, `RUN@best` (by the validation grade) others; the folder of an
evaluation is a run with one. A folder that is being written or was cut off gives what it has, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rft.compare.texts import ItemText, item_texts
from rft.errors import UserError
from rft.metrics import best_steps
from rft.plain import plain
from rft.salvage import config_and_state, metric_rows, salvaged
from rft.show import open_run
from rft.store import RunStore
from rft.types import Rollout, Split

_ORDER: tuple[Split, ...] = ("test", "validation", "train")
_NAMED = ("first", "last", "best")
_MAX_LABEL = 48  # characters: it heads a column


@dataclass(frozen=True, slots=True)
class Side:
    """`items`: the rollouts of each item, discarded ones too. `tools`: names that the environment is known to serve."""

    label: str
    store: RunStore
    step: int
    split: Split
    config: dict[str, Any]
    items: dict[str, list[Rollout]]
    texts: dict[str, ItemText]
    tools: frozenset[str]
    problems: list[str]

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for rollouts in self.items.values() for rollout in rollouts]


@dataclass(frozen=True, slots=True)
class Place:
    """A folder and which of its evaluations is meant: a step, or one of _NAMED."""

    store: RunStore
    which: str

    def steps(self, split: Split, *, is_explicit: bool) -> list[int]:
        """The steps at which a split was evaluated; of the training split, where it is asked for, those it trained."""
        rows = metric_rows(self.store, "evaluation")
        found = {row["step"] for row in rows if row["split"] == split}
        if split == "train" and is_explicit:
            found |= {row["step"] for row in metric_rows(self.store, "training")}
        return sorted(found) if rows or found else self._unfinished(split)

    def _unfinished(self, split: Split) -> list[int]:
        """Where no evaluation has ended: the first and last step that have rollouts of the split."""
        steps = self.store.rollout_steps()
        ends = sorted({*steps[:1], *steps[-1:]})
        return [step for step in ends if salvaged(self.store, step, split).rollouts]

    def step(self, split: Split, *, is_explicit: bool) -> int | None:
        """The step meant, None when the split was not evaluated there."""
        steps = self.steps(split, is_explicit=is_explicit)
        if self.which == "best":
            rows = metric_rows(self.store, "evaluation")
            validated = {row["step"] for row in rows if row["split"] == "validation"}
            best = best_steps(rows, 1, validated)
            return next(iter(best & set(steps)), None)
        if self.which in ("first", "last"):
            return (steps[0] if self.which == "first" else steps[-1]) if steps else None
        return int(self.which) if int(self.which) in steps else None


def place(text: str) -> Place:
    """What `RUN`, `RUN@12` or `RUN@best` means. Raises UserError when there is no run."""
    path, _, which = text.rpartition("@")
    if not path or (Path(text) / "config.json").exists():
        return Place(open_run(Path(text)), "last")
    if which not in _NAMED and not (which.isascii() and which.isdigit()):
        cure = "write RUN@12 for a step, RUN@first, RUN@last or RUN@best"
        raise UserError("there is no such evaluation", where=plain(text), cure=cure)
    return Place(open_run(Path(path)), which)


def find_sides(texts: Sequence[str], split: Split | None = None) -> list[Side]:
    """The sides that a person names, all on one split; of a single folder its first and its last evaluation.

    split: by default the one that all have, test before validation before train. Raises UserError.
    """
    places = [place(text) for text in texts]
    if len(places) == 1:
        if places[0].which != "last" or not texts[0]:
            raise UserError("one evaluation cannot be compared with itself", where=texts[0], cure="name another side")
        places = [Place(places[0].store, "first"), places[0]]
    found = _meant(places, split)
    sides = [_side(place, step, chosen) for place, step, chosen in found]
    return _labelled(sides)


def _meant(places: Sequence[Place], split: Split | None) -> list[tuple[Place, int, Split]]:
    for candidate in (split,) if split else _ORDER:
        steps = [place.step(candidate, is_explicit=split is not None) for place in places]
        meant = [(place, step, candidate) for place, step in zip(places, steps, strict=True) if step is not None]
        are_different = len({(place.store.path.resolve(), step) for place, step, _ in meant}) > 1
        if len(meant) == len(places) and are_different:
            return meant
    raise UserError(
        "the sides have no two evaluations of one split" if split is None else f"not all were evaluated on {split}",
        where=" ".join(str(place.store.path) for place in places),
        cure="; ".join(dict.fromkeys(_what_there_is(place) for place in places)),
    )


def _what_there_is(place: Place) -> str:
    found = {split: place.steps(split, is_explicit=False) for split in _ORDER}
    told = [f"{split} at {', '.join(map(str, steps))}" for split, steps in found.items() if steps]
    return f"{place.store.run_id} has {' and '.join(told) or 'no evaluation'}"


def _side(place: Place, step: int, split: Split) -> Side:
    config, state, problems = config_and_state(place.store)
    read = salvaged(place.store, step, split)
    items: dict[str, list[Rollout]] = {}
    for rollout in sorted(read.rollouts, key=lambda rollout: (rollout.item_id, rollout.attempt)):
        items.setdefault(rollout.item_id, []).append(rollout)
    rows = [r for r in metric_rows(place.store, "evaluation") if (r["step"], r["split"]) == (step, split)]
    if not rows and split != "train":
        problems.append("the evaluation has not ended: this is what it has so far")
    if not any(rollout.grade for rollout in read.rollouts):
        where = f"{place.store.path}, {split} at step {step}"
        cure = "; ".join(read.problems) or "compare another step, or evaluate again with `rft eval`"
        raise UserError("no rollout with a grade is left there", where=where, cure=cure)
    label = state.get("label") if state.get("kind") == "evaluation" else None
    return Side(
        label=plain(str(label or f"{place.store.run_id}@{step}"), max_chars=_MAX_LABEL),
        store=place.store,
        step=step,
        split=split,
        config=config,
        items=items,
        texts=item_texts(place.store, config, split, items),
        tools=_tools(rows, items),
        problems=[*problems, *read.problems],
    )


def _tools(rows: Sequence[dict[str, Any]], items: dict[str, list[Rollout]]) -> frozenset[str]:
    """Names that the metrics know; without them those that ever answered: a model makes up others."""
    known = {name.removeprefix("tool_num/") for row in rows for name in row if name.startswith("tool_num/")}
    calls = [pair for rollouts in items.values() for rollout in rollouts for pair in rollout.tool_calls]
    answered = {call.name for call, result in calls if call.error is None and result and not result.is_error}
    return frozenset(known or answered)


def _labelled(sides: Sequence[Side]) -> list[Side]:
    """With labels that tell the sides apart, and no longer than that needs."""
    if len({side.store.path.resolve() for side in sides}) == 1:
        sides = [replace(side, label=f"step {side.step}") for side in sides]
    labels = [side.label for side in sides]
    return [
        replace(side, label=f"{side.label} ({labels[: number + 1].count(side.label)})")
        if labels.count(side.label) > 1
        else side
        for number, side in enumerate(sides)
    ]
