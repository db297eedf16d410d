"""The table of faults in CONTRIBUTING.md is what happens; no fault loses an item, counts a rollout twice or leaks."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import FAULTS, NUM_ITEMS, SIZE, Fault, observe

CONTRIBUTING = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


def documented() -> dict[str, list[str]]:
    """Fault -> its row in the table, without the time."""
    lines = CONTRIBUTING.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    names = {fault.name for fault in FAULTS}
    return {row[0]: row[1:-1] for row in cells if row[0] in names}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_does_what_the_table_says(fault: Fault) -> None:
    seen = observe(fault)
    assert seen.columns == documented()[fault.name]
    ids = [rollout.id for rollout in seen.rollouts]
    assert len(set(ids)) == len(ids), "a rollout was counted twice"
    if seen.ending == "goes on":
        assert seen.num_graded == NUM_ITEMS * SIZE, "an item was lost"
        assert len(ids) == NUM_ITEMS * SIZE + seen.num_discarded
    assert seen.leaks == []
    assert seen.seconds < 20
