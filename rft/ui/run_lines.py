"""A run as a line of the list."""

from __future__ import annotations

from rft.errors import RftError
from rft.show import status
from rft.ui.runs import Known
from rft.ui.schema import Action, RunLine


def run_line(known: Known, actions: list[Action]) -> RunLine:
    """A run as far as it can be read."""
    found = known.job.status if known.job is not None else "unknown"
    step = steps = problem = None
    if known.store is not None:
        try:
            state = known.store.read_state()
            step, steps = state.get("step"), state.get("steps")
            found = known.job.status if known.job is not None else status(known.store)
        except RftError as error:
            problem = str(error)
    return RunLine(
        id=known.id,
        name=known.id,
        kind="unknown",
        status=found,
        step=step,
        steps=steps,
        job=known.job,
        actions=actions,
        problem=problem,
    )
