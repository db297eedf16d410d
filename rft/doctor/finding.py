"""What the doctor says: one cause, how bad it is, what shows it, what to do."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.types import Record

Severity = Literal["high", "medium", "low"]


class Finding(Record):
    """One cause. Text of models, tools and datasets in it has been made harmless (rft/plain.py)."""

    check: str  # what found it, e.g. "dead_tool": stable, for scripts and warnings
    title: str  # the cause in a few words
    severity: Severity
    weight: float = Field(ge=0, le=1)  # the share of the run that it spoilt, as far as that can be said; ranks
    evidence: str  # one or two sentences with the numbers
    numbers: dict[str, float] = Field(default_factory=dict)
    rollout_ids: list[str] = Field(default_factory=list)  # examples, at most 5
    steps: tuple[int, int] | None = None  # the first and the last step it shows in
    cure: str  # what to change, naming the config's keys


class Diagnosis(Record):
    """All findings about a run, the worst first."""

    run_id: str
    findings: list[Finding]
    num_steps: int
    checks: list[str]  # that were made
    problems: list[str] = Field(default_factory=list)  # of the run folder: what of it could not be read
