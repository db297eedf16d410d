"""The checks that are cheap enough for every step of a training, each told once and again when it got much worse.

Keeps the rows it needs in memory. Reads the run folder at the first step, for a run that was resumed, and the rollouts
of a step when a tool begins to fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rft.config import RunConfig
from rft.doctor import collapse, graders, groups, hacking, lengths, policy, tools
from rft.doctor.case import Case, Row, read_step
from rft.doctor.diagnosis import Check, examine
from rft.doctor.finding import Finding
from rft.files import finite
from rft.store import RunStore
from rft.types import Group, Rollout, StopReason

WORSE = 0.3  # of weight: much worse than when it was told
_FIRST_ROWS, _LAST_ROWS = 16, 32  # as many as a case's windows look at
_MAX_ROLLOUTS = 256  # of a step, so that a large one costs no more
_PROVEN_STEPS = 2  # a symptom in one step may be chance

# without what reads whole answers, what only a finished run shows, and what is no news to who watches
CHEAP: tuple[Check, ...] = (
    tools.dead_tools,
    tools.refused_calls,
    tools.bad_calls,
    tools.discarded,
    graders.grader_failures,
    graders.constant_grader,
    graders.unread_answers,
    groups.useless_groups,
    groups.stale_groups,
    collapse.learning_rate,
    collapse.grade_fell,
    policy.logprob_gap,
    policy.clipping,
    policy.entropy,
    policy.gradient,
    hacking.shadow_falls,
    lengths.truncated,
)


class Alarm:
    """Watches one run while it trains."""

    def __init__(self, config: RunConfig, store: RunStore) -> None:
        self._store = store
        self._config = config.model_dump(mode="json", include={"environment", "grader", "model", "training"})
        self._first: list[Row] = []
        self._last: deque[Row] = deque(maxlen=_LAST_ROWS)
        self._sampled_first: list[Rollout] = []
        self._told: dict[str, float] = {}
        self._has_read = False

    def look(self, row: Row, groups_of_step: Sequence[Group]) -> list[Finding]:
        """What is new, or much worse, after a step whose row has been written. Low findings are no warnings."""
        if not self._has_read:
            self._read(before=int(row["step"]))
        self._keep(row)
        rollouts = [rollout for group in groups_of_step for rollout in group.rollouts][:_MAX_ROLLOUTS]
        self._sampled_first = self._sampled_first or rollouts
        rollouts += self._discarded(row)
        case = Case(
            config=self._config,
            training=[*self._first, *self._last],
            rollouts=rollouts,
            first=self._sampled_first,
        )
        found = [finding for finding in examine(case, CHEAP).findings if finding.severity != "low"]
        news = [finding for finding in found if self._is_news(finding, len(case.training))]
        self._told |= {finding.check: finding.weight for finding in news}
        return news

    def _discarded(self, row: Row) -> list[Rollout]:
        """Those that tools failed, which groups do not hold: read when first met, so that the tool is named."""
        if "dead_tool" in self._told or not row.get(f"train/stop/{StopReason.TOOL_FAILED}"):
            return []
        found = read_step(self._store, int(row["step"]), _MAX_ROLLOUTS)
        return [rollout for rollout in found if rollout.stop_reason == StopReason.TOOL_FAILED]

    def _is_news(self, finding: Finding, num_steps: int) -> bool:
        if finding.check not in self._told:
            return num_steps >= _PROVEN_STEPS
        return finding.weight >= self._told[finding.check] + WORSE

    def _keep(self, row: Row) -> None:
        """As a reader of the file would see it: what is not finite is null."""
        (self._first if len(self._first) < _FIRST_ROWS else self._last).append(finite(row))

    def _read(self, before: int) -> None:
        """The rows of a run that goes on, and what was told of it."""
        self._has_read = True
        for row in self._store.metrics():
            if row.get("kind") == "training" and row.get("step", before) < before:
                self._keep(row)
        for event in self._store.events():
            data = event.get("data")
            if event.get("level") == "warn" and isinstance(data, dict) and "check" in data:
                self._told[str(data["check"])] = float(data.get("weight") or 0.0)


def warning(finding: Finding) -> str:
    """A finding as one line."""
    return f"{finding.title}: {finding.evidence}; cure: {finding.cure}"
