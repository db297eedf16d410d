"""The error tree: the user's mistakes, the world's failures; everything else is a bug and propagates.

A user's error is raised before heavy work and names what is wrong and the cure. A world's error is typed at its
source; `retryable` says whether the same request may succeed later. `attribute` is the one boundary that turns
an exception inside a rollout into a stop reason.
"""

from __future__ import annotations

from rft.types import StopReason


class RftError(Exception):
    """Base of all errors rft raises on purpose. The CLI prints its text and exits with `exit_code`."""

    exit_code = 1
    retryable = False


class UserError(RftError):
    """Something the user wrote or asked for is wrong. The text names where, what, and the cure."""

    exit_code = 2

    def __init__(self, problem: str, *, where: str = "", cure: str = "") -> None:
        self.problem, self.where, self.cure = problem, where, cure
        super().__init__((f"{where}: " if where else "") + problem + (f"\n  cure: {cure}" if cure else ""))


class ConfigError(UserError):
    """A wrong configuration; `where` is the path of the field, e.g. `training.steps`."""


class DataError(UserError):
    """A wrong dataset row; `where` is `file:line: field`. `found`: (line, field, problem, cure) of each wrong place."""

    def __init__(
        self, problem: str, *, where: str = "", cure: str = "", found: tuple[tuple[int, str, str, str], ...] = ()
    ) -> None:
        self.found = found
        super().__init__(problem, where=where, cure=cure)


class WorldError(RftError):
    """A failure outside rft: an engine, a tool server, a grader, a disk."""

    stop_reason: StopReason | None = None

    def __init__(self, problem: str, *, retryable: bool = False, cure: str = "") -> None:
        self.problem, self.retryable, self.cure = problem, retryable, cure
        super().__init__(problem + (f"\n  cure: {cure}" if cure else ""))


class EngineError(WorldError):
    """The sampling engine did not start, died, or refused a request."""

    stop_reason = StopReason.ENGINE_FAILED


class EngineAwayError(EngineError):
    """Nothing answers where a server was: it may come back, with the weights that it was started with."""


class EngineBehindError(EngineError):
    """The engine answers, but not with the weights that it was given last: it must load them first."""


class ToolError(WorldError):
    """A tool endpoint failed in a way the model must not see (5xx, transport) after all retries."""

    stop_reason = StopReason.TOOL_FAILED


class GraderError(WorldError):
    """A grader itself failed; never a grade of 0. `flag` is the contract's name of the failure."""

    stop_reason = StopReason.GRADER_FAILED
    flag = "other_error"

    def __init__(self, problem: str, *, flag: str = "", retryable: bool = False, cure: str = "") -> None:
        self.flag = flag or type(self).flag
        super().__init__(problem, retryable=retryable, cure=cure)


class SyncError(WorldError):
    """New weights did not arrive in the engine: the probe found different log-probabilities."""


class StorageError(WorldError):
    """The run folder cannot be written (disk full, permissions)."""


class MemoryLimitError(WorldError):
    """A micro-batch does not fit into memory, nor does half of it."""


class NumericsError(WorldError):
    """A loss, gradient or log-probability is NaN or infinite, or drifted beyond its bound."""


class NoProgressError(WorldError):
    """The run cannot go on: too many rollouts were discarded for the same cause, or none gets any further."""


class GraderFailuresError(NoProgressError):
    """The same, and the cause is the grader."""


class ToolsDownError(NoProgressError):
    """The same, and the cause are the tools."""


class ClusterError(WorldError):
    """Slurm, or a node that it gave us, cannot do what was asked."""


class Paused(Exception):
    """No failure: somebody asked the run to pause, and everything up to `step` is saved. Ends the run with code 0."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"paused after step {step}" if step else "paused before its first step")


def first_cause(failures: BaseExceptionGroup) -> BaseException:
    """The first failure inside nested exception groups: its siblings were cancelled because of it."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def attribute(error: BaseException) -> StopReason | None:
    """The stop reason a rollout gets for `error`; None for a bug, which must propagate."""
    if isinstance(error, WorldError):
        return error.stop_reason
    return None
