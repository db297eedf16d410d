"""Finished rollouts of an interrupted run that the resumed one uses instead of sampling them again.

What may be used is decided by the versions that sampled it: a resumed run has the weights up to its checkpoint and no
later ones. Each is used at most once, under its own id; what nobody asked for can be told, so that it is moved aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from rft.types import Rollout, Split, rollout_id


class StoredRollouts:
    """The rollouts that are there already, to be taken by their id."""

    def __init__(self) -> None:
        self._waiting: dict[str, Rollout] = {}
        self._taken: dict[str, Rollout] = {}

    def fill(self, rollouts: Iterable[Rollout]) -> None:
        self._waiting |= {rollout.id: rollout for rollout in rollouts}

    def take(self, rollout_id: str) -> Rollout | None:
        """The finished rollout of that id, once; None where it must be sampled."""
        rollout = self._waiting.pop(rollout_id, None)
        if rollout is not None:
            self._taken[rollout_id] = rollout
        return rollout

    def __contains__(self, rollout_id: str) -> bool:
        """True for what was taken: it is in the run folder already, and what failed there may have been repaired."""
        return rollout_id in self._taken

    def settle(self, split: Split, step: int) -> tuple[int, list[str]]:
        """Forget one split of a step that is complete: how many were taken, and the ids nobody asked for."""
        taken = [rollout for rollout in self._taken.values() if (rollout.split, rollout.step) == (split, step)]
        left = [rollout for rollout in self._waiting.values() if (rollout.split, rollout.step) == (split, step)]
        for rollout in (*taken, *left):
            self._taken.pop(rollout.id, None)
            self._waiting.pop(rollout.id, None)
        return len(taken), [rollout.id for rollout in left]

    def told(self) -> str:
        """What waits, for a person: `31 finished rollouts of step 8`; "" when nothing does."""
        counts = Counter((rollout.step, rollout.split != "train") for rollout in self._waiting.values())
        parts = [
            f"{count} finished rollout{'s' * (count > 1)} of {'the evaluation at ' if is_evaluation else ''}step {step}"
            for (step, is_evaluation), count in sorted(counts.items())
        ]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Usable:
    """Whether a run that goes on after the checkpoint of `step` could have made a rollout itself.

    Of a later training step t every token must come from a version between t - 1 - `staleness` and `step`; of the
    evaluation of `step` on one of `splits`, from that version. A run that only samples has no versions but 0: its
    `staleness` is None. Rollouts whose grader failed are not usable, since graders may have been repaired.
    """

    run_id: str
    step: int
    staleness: int | None
    splits: Collection[Split] = ()

    def __call__(self, rollout: Rollout) -> bool:
        return self._is_wanted(rollout) and self._is_current(rollout) and is_whole(rollout, self.run_id)

    def _is_wanted(self, rollout: Rollout) -> bool:
        if rollout.split == "train":
            return rollout.step > self.step
        return rollout.step == self.step and rollout.split in self.splits

    def _is_current(self, rollout: Rollout) -> bool:
        oldest = latest = self.step
        if self.staleness is None:
            oldest = latest = 0
        elif rollout.split == "train":
            oldest = rollout.step - 1 - self.staleness
        return oldest <= latest and all(oldest <= turn.policy_version <= latest for turn in rollout.turns)


def is_whole(rollout: Rollout, run_id: str) -> bool:
    """Whether a stored rollout is the run's own, and its grader did not fail: graders may have been repaired."""
    place = (rollout.split, rollout.step, rollout.item_id, rollout.attempt)
    if rollout.id != rollout_id(run_id, *place):  # the folder was renamed, or the row was edited
        return False
    return rollout.stop_reason.is_discarded or (rollout.grade is not None and rollout.grade.failure is None)
