"""The rollouts that a comparison's page shows in full: of the items with the largest changes, one of each side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rft.compare.result import Comparison, Pairing
from rft.salvage import config_and_state, salvaged
from rft.store import RunStore
from rft.transcript import prompt_of
from rft.types import Rollout

_NUM_ITEMS = 3  # wins, and as many losses, of each pair


@dataclass(frozen=True, slots=True)
class Traced:
    """A rollout with the side it is of, its first prompt as text, and where it is in the page."""

    label: str
    rollout: Rollout
    prompt: str
    anchor: str


def anchor(place: int, rollout_id: str) -> str:
    """Runs that were copied have the ids of the first: the side belongs to the place in the page."""
    return f"side{place}-{rollout_id}"


def traced(comparison: Comparison) -> list[Traced]:
    """Those that their run folders still have, in the order of the items."""
    wanted = list(dict.fromkeys(_wanted(comparison)))
    found: dict[tuple[int, str], Traced] = {}
    for place, side in enumerate(comparison.sides):
        ids = {rollout_id for of, rollout_id in wanted if of == place}
        store = RunStore(Path(side.path))
        config, _, _ = config_and_state(store)
        for rollout in salvaged(store, side.step, side.split).rollouts if ids else ():
            if rollout.id in ids:
                prompt = prompt_of(rollout, store, config)
                found[place, rollout.id] = Traced(side.label, rollout, prompt, anchor(place, rollout.id))
    return [found[one] for one in wanted if one in found]


def _wanted(comparison: Comparison) -> Iterator[tuple[int, str]]:
    """(side, rollout id)."""
    for place, pairing in enumerate(comparison.pairings, 1):
        yield from _of_pair(pairing, place)


def _of_pair(pairing: Pairing, place: int) -> Iterator[tuple[int, str]]:
    for outcome in ("win", "loss"):
        for line in [line for line in pairing.items if line.outcome == outcome][:_NUM_ITEMS]:
            for side, attempts in ((0, line.first), (place, line.other)):
                yield from ((side, rollout_id) for rollout_id in attempts.rollout_ids[:1])
