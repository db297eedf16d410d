"""A diagnosis as a person reads it in a terminal. Everything in it passes through rft.plain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group
from rich.text import Text

from rft.doctor.finding import Diagnosis, Finding
from rft.plain import plain

_COLOURS = {"high": "red", "medium": "yellow", "low": "cyan"}


def told(diagnosis: Diagnosis, run: Path) -> Group:
    """One ranked list; `run` is how the reader named the run, for the commands that are shown."""
    return Group(*_parts(diagnosis, run))


def _parts(diagnosis: Diagnosis, run: Path) -> Iterator[Text]:
    num, steps = len(diagnosis.findings), f"{diagnosis.num_steps} steps"
    verdict = f"{num} finding{'s' if num != 1 else ''}, the worst first" if num else "nothing wrong found"
    yield _text(f"{diagnosis.run_id}: {verdict} ({steps})", "bold")
    for number, finding in enumerate(diagnosis.findings, 1):
        title = f"{number}. [{finding.severity}] {finding.title} ({finding.check}{_steps(finding)})"
        yield _text(title, finding.severity)
        for line in _lines(finding, run):
            yield _text(f"   {line}")
    if not num:
        yield _text(f"checked: {', '.join(name.replace('_', ' ') for name in diagnosis.checks)}")
    for problem in diagnosis.problems:
        yield _text(f"not read: {problem}", "low")


def _steps(finding: Finding) -> str:
    if finding.steps is None:
        return ""
    first, last = finding.steps
    return f", step {first}" if first == last else f", steps {first} to {last}"


def _lines(finding: Finding, run: Path) -> Iterator[str]:
    yield finding.evidence
    yield f"cure: {finding.cure}"
    for rollout_id in finding.rollout_ids[:2]:
        yield f"see: rft show {run} --rollout {rollout_id}"


def _text(text: str, style: str = "") -> Text:
    return Text(plain(text), style=_COLOURS.get(style, style))
