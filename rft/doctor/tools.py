"""What is wrong with tools and with how the model calls them: dead, refusing, malformed, unknown, unused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rft.doctor.case import Case, ids_of, mean, span, words
from rft.doctor.ending import error_kind
from rft.doctor.finding import Finding, Severity
from rft.engines.pool import OUR_PLACE
from rft.types import Rollout, StopReason, ToolCall, ToolResult

MIN_CALLS = 8  # fewer say nothing about a share
FAILED_SHARE = 0.02  # of the rollouts: a server that is well loses none, its calls are retried
FAILED_SHARE_HIGH = 0.1  # more than a tenth of the sampling is thrown away
REFUSED_SHARE = 0.5  # a model that learns a tool is refused at first, later not half the time
REFUSED_SHARE_HIGH = 0.9  # with one and the same answer: nothing the model could do would be accepted
MALFORMED_SHARE, MALFORMED_SHARE_HIGH = 0.15, 0.4  # of the calls now; small models start at 0.4 and unlearn it
UNUSED_CALLS = 0.05  # calls per rollout: practically none
USED_CALLS = 0.5  # what "used them at first" means

_NAMED = re.compile(r"^tool ([^\s:]{1,80})")  # how rft/envs begin the error of a call
_MAX_NAME, _MAX_ERROR = 60, 160
_DOWN, _BACK = " is down: sampling pauses", re.compile(r" is back after (\d+) s")


@dataclass(slots=True)
class _Failures:
    """Of one tool: the rollouts that its failing calls discarded, and how its calls went otherwise."""

    rollouts: list[Rollout] = field(default_factory=list)
    num_served: int = 0

    @property
    def share(self) -> float:
        """Of its calls, those that failed for good."""
        return len(self.rollouts) / max(1, len(self.rollouts) + self.num_served)


def dead_tools(case: Case) -> Iterator[Finding]:
    """`dead_tool`: rollouts discarded because a tool's server failed, or was down."""
    discarded = _share_of_stop(case, StopReason.TOOL_FAILED)
    down, seconds = _outages(case)
    has_ended = case.status == "failed" and error_kind(str(case.state.get("error"))) == "run_failed_by_tools"
    if discarded < FAILED_SHARE and not down and not has_ended:
        return
    failures = {name: failed for name, failed in _failures(case.train).items() if failed.rollouts}
    worst = max(failures, key=lambda name: len(failures[name].rollouts), default="")
    failed = failures.get(worst, _Failures())
    named = words(worst, _MAX_NAME) or "a tool"
    severity: Severity = "high" if has_ended or discarded >= FAILED_SHARE_HIGH else "medium"
    yield Finding(
        check="dead_tool",
        title=f"the tool {named} fails" if worst else "a tool's server fails",
        severity=severity,
        weight=1.0 if has_ended else min(1.0, discarded + (0.1 if down else 0.0)),
        evidence=_told_failures(case, named, failed, discarded, down, seconds, has_ended),
        numbers={
            "discarded_share": discarded,
            "failed_call_share": failed.share,
            "num_failed": len(failed.rollouts),
            "num_outages": len(down),
            "down_s": seconds,
        },
        rollout_ids=ids_of(failed.rollouts),
        steps=_steps_with(case, f"train/stop/{StopReason.TOOL_FAILED}") or case.steps,
        cure=f"look at the log of the server of {named} at these times and repair it; where it is only slow or rate"
        " limited, raise its timeout_s, max_attempts or rate_limit in environment.tools",
    )


def _told_failures(
    case: Case, name: str, failed: _Failures, discarded: float, down: list[str], down_s: float, has_ended: bool
) -> str:
    told = []
    if failed.rollouts:
        errors = Counter(words((r.error or "").partition("\n")[0], _MAX_ERROR) for r in failed.rollouts)
        text, num = errors.most_common(1)[0]
        told.append(
            f"{len(failed.rollouts)} of {len(failed.rollouts) + failed.num_served} sampled calls of {name} failed for"
            f" good, {num} of them so: {text}"
        )
    if discarded:
        told.append(f"{discarded:.0%} of the rollouts were discarded for it")
    if down:
        told.append(f"{down[-1]} was down {len(down)} times" + (f", {down_s:.0f} s in all" if down_s else ""))
    if has_ended:
        told.append("it ended the run: " + words(case.state.get("error"), 2 * _MAX_ERROR))
    return "; ".join(told)


def _failures(rollouts: Sequence[Rollout]) -> dict[str, _Failures]:
    found: dict[str, _Failures] = {}
    for rollout in rollouts:
        for call, result in _well_formed(rollout):
            if result is not None:
                found.setdefault(call.name, _Failures()).num_served += 1
        if rollout.stop_reason == StopReason.TOOL_FAILED:
            found.setdefault(_failed_tool(rollout), _Failures()).rollouts.append(rollout)
    return found


def _failed_tool(rollout: Rollout) -> str:
    """As the error names it; else the one whose call got no result."""
    named = _NAMED.match(rollout.error or "")
    if named:
        return named.group(1)
    return next((call.name for call, result in _well_formed(rollout) if result is None), "")


def _well_formed(rollout: Rollout) -> list[tuple[ToolCall, ToolResult | None]]:
    return [(call, result) for call, result in rollout.tool_calls if call.error is None]


def _share_of_stop(case: Case, reason: StopReason) -> float:
    """Of all rollouts of the run as the rows count them; without rows, and of the step in flight, of the sample."""
    ends = [rollout.stop_reason for rollout in case.train]
    sampled = ends.count(reason) / len(ends) if ends else 0.0
    if not case.training:
        return sampled
    shares = [(row.get(f"train/stop/{reason}") or 0.0) for row in case.training]
    return max(sum(shares) / len(shares), sampled if len(ends) >= MIN_CALLS else 0.0)


def _steps_with(case: Case, name: str) -> tuple[int, int] | None:
    return span([row for row in case.training if row.get(name)])


def _outages(case: Case) -> tuple[list[str], float]:
    """What was down, once per outage, and for how many seconds in all as far as it came back."""
    messages = [str(event.get("message", "")) for event in case.events]
    messages = [text for text in messages if not text.startswith(OUR_PLACE)]
    down = [words(text.partition(_DOWN)[0], 2 * _MAX_NAME) for text in messages if _DOWN in text]
    return down, sum(float(found.group(1)) for text in messages if (found := _BACK.search(text)))


# --- calls that get an answer, and not a good one ---


def refused_calls(case: Case) -> Iterator[Finding]:
    """`refused_calls`: a tool answers well-formed calls with errors."""
    answers: dict[str, list[tuple[Rollout, ToolResult]]] = {}
    for rollout in case.latest:
        for call, result in _well_formed(rollout):
            if result is not None:
                answers.setdefault(call.name, []).append((rollout, result))
    num_all = sum(map(len, answers.values()))
    for name, results in answers.items():
        refused = [(rollout, result) for rollout, result in results if result.is_error]
        share = len(refused) / len(results)
        if len(results) < MIN_CALLS or share < REFUSED_SHARE:
            continue
        text, num_same = Counter(result.output for _, result in refused).most_common(1)[0]
        is_dead = share >= REFUSED_SHARE_HIGH and num_same >= REFUSED_SHARE_HIGH * len(refused)
        named = words(name, _MAX_NAME)
        yield Finding(
            check="refused_calls",
            title=f"the tool {named} refuses " + ("every call" if is_dead else "most calls"),
            severity="high" if is_dead and len(results) >= num_all / 2 else "medium",
            weight=share * len(results) / num_all,
            evidence=f"{len(refused)} of {len(results)} well-formed calls were answered with an error, {num_same} of"
            f" them with: {words(text, _MAX_ERROR)}",
            numbers={"refused_share": share, "num_calls": len(results)},
            rollout_ids=ids_of(rollout for rollout, _ in refused),
            steps=case.steps,
            cure="where the answer is the server's own trouble (a key, a path, a limit), correct environment.tools;"
            " where the call is wrong, say in the tool's description what its arguments must be",
        )


def bad_calls(case: Case) -> Iterator[Finding]:
    """`malformed_calls` and `unknown_tools`: calls that could not be executed."""
    calls = [(rollout, call) for rollout in case.latest for call, _ in rollout.tool_calls]
    if len(calls) < MIN_CALLS:
        return
    unknown = [(rollout, call) for rollout, call in calls if (call.error or "").startswith("there is no tool")]
    malformed = [(r, call) for r, call in calls if call.error and not call.error.startswith("there is no tool")]
    cures = {
        "malformed_calls": "give the call room (rollout.max_tokens_per_turn), sample cooler (rollout.temperature), or"
        " warm the model up on demonstrations (`rft warmup`)",
        "unknown_tools": "name the tools and show a call in the system message of the rows, or warm the model up on"
        " demonstrations (`rft warmup`)",
    }
    titles = {"malformed_calls": "calls are malformed", "unknown_tools": "the model calls tools that do not exist"}
    for check, found in (("malformed_calls", malformed), ("unknown_tools", unknown)):
        share = len(found) / len(calls)
        if share < MALFORMED_SHARE:
            continue
        text, num = Counter(call.error or "" for _, call in found).most_common(1)[0]
        yield Finding(
            check=check,
            title=titles[check],
            severity="high" if share >= MALFORMED_SHARE_HIGH else "medium",
            weight=share,
            evidence=f"{len(found)} of the last {len(calls)} calls; the most frequent error, {num} times:"
            f" {words(text, _MAX_ERROR)}",
            numbers={"share": share, "num_calls": len(calls)},
            rollout_ids=ids_of(rollout for rollout, _ in found),
            steps=case.steps,
            cure=cures[check],
        )


def unused_tools(case: Case) -> Iterator[Finding]:
    """`unused_tools`: there are tools, and the model hardly calls any, or stopped to."""
    now, before = mean(case.recent, "train/tool_calls"), mean(case.training[:1], "train/tool_calls")
    if case.setting("environment") is None or now is None or before is None or now > UNUSED_CALLS:
        return
    has_stopped = before >= USED_CALLS
    yield Finding(
        check="unused_tools",
        title="the model " + ("stopped calling tools" if has_stopped else "calls no tools"),
        severity="medium",
        weight=0.5 if has_stopped else 0.4,
        evidence=f"{now:.2f} calls per rollout now, {before:.2f} at first",
        numbers={"tool_calls": now, "tool_calls_at_first": before},
        rollout_ids=ids_of(rollout for rollout in case.latest if not rollout.tool_calls),
        steps=case.steps,
        cure="pay for the use of a tool in the grader, check training.costs.tool_calls, show a call in the rows'"
        " system message, or warm the model up (`rft warmup`)",
    )


# --- rollouts that were thrown away for other reasons ---

DISCARDED_SHARE, DISCARDED_SHARE_HIGH = 0.05, 0.3  # of the rollouts; rollout.max_discarded_share ends the run at 0.5


def discarded(case: Case) -> Iterator[Finding]:
    """`discarded`: by the engine, the grader or a cancellation. Those of tools are `dead_tool`'s."""
    for reason in (StopReason.ENGINE_FAILED, StopReason.GRADER_FAILED):
        share = _share_of_stop(case, reason)
        if share < DISCARDED_SHARE:
            continue
        found = [rollout for rollout in case.train if rollout.stop_reason == reason]
        who = "engine" if reason == StopReason.ENGINE_FAILED else "grader"
        error = words((found[0].error or "").partition("\n")[0], _MAX_ERROR) if found else "see the rollouts"
        yield Finding(
            check=f"discarded_by_{who}",
            title=f"the {who} makes rollouts be discarded",
            severity="high" if share >= DISCARDED_SHARE_HIGH else "medium",
            weight=min(1.0, share),
            evidence=f"{share:.0%} of the rollouts ended with {reason}, for example: {error}",
            numbers={"share": share},
            rollout_ids=ids_of(found),
            steps=_steps_with(case, f"train/stop/{reason}") or case.steps,
            cure="read engine.log in the run folder; lower engine.max_concurrent or raise engine.request_timeout_s"
            if who == "engine"
            else "try the grader on one answer with `rft grade run` and repair it",
        )
