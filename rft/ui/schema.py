"""What the page reads and sends: the shapes below /ui/api, one model per answer.

Times are Unix seconds, durations seconds. Text of models, tools and datasets is raw here: the front end shows it with
`textContent` alone. Long texts come cut, with a reference to the rest.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rft.doctor.finding import Diagnosis, Finding
from rft.types import Record, Split

__all__ = ["Diagnosis", "Finding"]

MAX_TEXT = 20_000  # characters of one text in an answer
MAX_GRADED = 50  # rollouts of one try of a grader

Action = Literal["pause", "resume", "cancel"]
Kind = Literal["training", "evaluation", "sampling", "warmup", "unknown"]


class About(Record):
    """GET /ui/api/about, the only one that needs no key."""

    mode: Literal["folder", "server"]  # server: jobs can be created, and /v1 is there
    needs_key: bool  # sent as `authorization: Bearer ...`
    version: str


# --- runs ---


class JobLine(Record):
    """The job that a run belongs to, where a server runs it."""

    id: str
    status: str
    model: str
    fine_tuned_model: str | None = None
    created_at: float
    error: str | None = None


class RunLine(Record):
    """A run in the list. Numbers are null where the run has none yet."""

    id: str
    name: str
    kind: Kind
    status: str  # queued starting running paused succeeded failed cancelled killed unknown
    step: int | None = None
    steps: int | None = None
    started_at: float | None = None
    updated_at: float | None = None
    split: Split | None = None  # of the grades: validation where it is evaluated, else train
    grades: list[float | None] = Field(default_factory=list)  # over the steps, thinned to at most 60
    job: JobLine | None = None
    actions: list[Action] = Field(default_factory=list)  # that make sense now
    problem: str | None = None  # why less is shown than there is


class RunList(Record):
    """GET /ui/api/runs: newest first."""

    runs: list[RunLine]


class Event(Record):
    time: float
    level: str
    message: str


class RunView(Record):
    """GET /ui/api/runs/{run}"""

    run: RunLine
    config: dict[str, Any]  # without secrets
    events: list[Event]  # the last 200
    doing: list[str]  # what it does now, as lines; empty when it does nothing
    problems: list[str]  # what of the folder could not be read: a line cut off, an older version


class Revision(Record):
    """GET /ui/api/runs/{run}/revision: cheap; changes whenever anything of the run does."""

    revision: str
    status: str


# --- charts ---


class Series(Record):
    """One line of a chart; x are steps, gaps are null. `low` and `high` bound its 95% interval, or its percentiles."""

    name: str
    split: Split | None = None
    x: list[int]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None


class Chart(Record):
    """`stacked`: the series add up (shares, seconds per phase). Thinned so that peaks stay."""

    id: str  # the same in every run, so that runs can be drawn into one chart
    title: str
    unit: str
    help: str  # how to read it, one sentence
    kind: Literal["lines", "stacked"] = "lines"
    series: list[Series]


class Charts(Record):
    """GET /ui/api/runs/{run}/charts?points=1000: grade, part grades, useful groups, tool calls per rollout by tool
    (mean, and the distribution as percentiles), reasoning and completion tokens, latency percentiles, errors by kind,
    phase durations, and what of the update matters. Charts without any number are left out.
    """

    revision: str
    charts: list[Chart]


# --- rollouts ---


class RolloutLine(Record):
    """A row of the table of rollouts."""

    id: str
    step: int
    split: Split
    item_id: str
    attempt: int
    grade: float | None = None
    stop_reason: str
    num_turns: int
    tools: dict[str, int] = Field(default_factory=dict)  # calls by tool
    num_tokens: int  # sampled
    num_reasoning_tokens: int
    started_at: float
    duration_s: float
    error: str | None = None  # why it was discarded, or the first error flag of its grade; cut
    opening: str = ""  # of its answer, cut


class RolloutPage(Record):
    """GET /ui/api/runs/{run}/rollouts with any of split, step, step_from, step_to, item, grade_min, grade_max, stop,
    tool, error (a part of it), text (in what was said, called or returned), sort (a field, `-` before it: descending;
    default -step), limit (default 100, at most 500), after (`next` of the page before).
    """

    rollouts: list[RolloutLine]
    next: str | None = None
    num_matching: int
    indexed_share: float  # below 1 while old rollouts are still being looked through; ask again


class Choices(Record):
    """GET /ui/api/runs/{run}/choices: what the filters can be set to."""

    steps: tuple[int, int] | None
    splits: list[Split]
    stop_reasons: list[str]
    tools: list[str]
    num_rollouts: int
    indexed_share: float


class Text(Record):
    """A text, cut at MAX_TEXT characters. The rest: GET /ui/api/runs/{run}/rollouts/{id}/texts/{ref}?offset=N."""

    text: str
    num_chars: int
    ref: str


class TraceCall(Record):
    """One tool call. `started_s` counts from the start of the rollout."""

    call_id: str
    name: str
    arguments: Text
    malformed: str | None = None  # it was never executed
    result: Text | None = None  # null: the rollout ended before
    is_error: bool = False
    started_s: float
    latency_s: float
    num_attempts: int = 1


class TraceReply(Record):
    role: str
    content: Text


class TraceTurn(Record):
    index: int
    started_s: float
    sampled_s: float
    num_input_tokens: int
    num_output_tokens: int
    num_reasoning_tokens: int
    finish_reason: str
    policy_version: int
    is_fork: bool
    reasoning: Text
    content: Text
    calls: list[TraceCall]
    replies: list[TraceReply]


class TraceGrade(Record):
    name: str
    score: float
    errors: dict[str, str]
    latency_s: float
    is_cached: bool
    parts: list[TraceGrade]
    shadow: dict[str, float]
    shadow_errors: dict[str, str]


class Trace(Record):
    """GET /ui/api/runs/{run}/rollouts/{id}"""

    rollout: RolloutLine
    run_id: str
    seed: int
    error: str | None = None
    prompt: Text  # as the model read it; without a tokenizer, how long it is
    item: Text | None = None  # the dataset row as JSON; null where the data file is gone
    environment: Text | None = None
    turns: list[TraceTurn]
    grade: TraceGrade | None = None
    group: list[RolloutLine]  # the rollouts of the same item at the same step, this one too, by attempt


class Token(Record):
    text: str
    id: int
    logprob: float | None = None  # natural log; null where it was not sampled
    is_trained: bool  # counts in the loss


class Tokens(Record):
    """GET /ui/api/runs/{run}/rollouts/{id}/tokens?offset=0&limit=2000: all sequences of the rollout one after another,
    as they are trained. Advantages are those of the group's grades.
    """

    tokens: list[Token]
    num_tokens: int
    sequence_starts: list[int]
    advantage: float | None = None
    problem: str | None = None  # why texts are missing, e.g. no tokenizer


class TextPart(Record):
    """GET .../texts/{ref}?offset=N"""

    text: str
    offset: int
    num_chars: int


# --- tries ---


class GraderTry(Record):
    """POST /ui/api/runs/{run}/grade: a grader, as hosted RFT takes it, on stored rollouts."""

    grader: dict[str, Any]
    rollout_ids: list[str] = Field(default_factory=list, max_length=MAX_GRADED)  # empty: the newest `num_rollouts`
    num_rollouts: int = Field(8, ge=1, le=MAX_GRADED)


class TriedGrade(Record):
    rollout: RolloutLine
    grade: TraceGrade | None = None
    problem: str | None = None  # the grader failed on it


class GraderResult(Record):
    """`problem`: the grader itself is wrong, and nothing was graded."""

    graded: list[TriedGrade]
    mean_old: float | None = None
    mean_new: float | None = None
    problem: str | None = None
    field: str | None = None


class DatasetTry(Record):
    """POST /ui/api/datasets/validate: the text of a JSONL file."""

    text: str
    environment: dict[str, Any] | None = None  # of a run's config: are the tools of the rows served?


class DatasetProblem(Record):
    line: int | None
    field: str | None
    problem: str
    cure: str


class DatasetResult(Record):
    """`num_problems` counts all of them, `problems` are the first 100."""

    num_rows: int
    num_problems: int
    problems: list[DatasetProblem]
    columns: dict[str, int]  # how many rows have a key
    tools: list[str]
    example: str | None  # the messages of the first good row, as JSON


class Done(Record):
    """The answer to an action: POST /ui/api/runs/{run}/pause | resume | cancel."""

    run: RunLine
