"""A stand-in for the page's application while that is built elsewhere: the same answers, read the slow way.

It keeps the security headers of the real one, so that what the browser forbids is forbidden in the tests too.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

import rft.ui
from rft.doctor.finding import Diagnosis, Finding
from rft.show import status
from rft.store import RunStore
from rft.types import Grade, Rollout, ToolCall
from rft.ui import schema as s

STATIC = Path(rft.ui.__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build_fixture(
    runs_dir: Path, *, plotly: Path | None, key: str | None = None, mode: str = "folder", tokenizer: Any = None
) -> FastAPI:
    app = FastAPI()
    runs = _Runs(runs_dir, tokenizer)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        path = request.url.path
        needs = key is not None and (path.startswith("/ui/api/") or path.startswith("/v1/")) and path != "/ui/api/about"
        if needs and request.headers.get("authorization") != f"Bearer {key}":
            answer: Any = _refused(401, "Incorrect API key provided.")
        else:
            answer = await call_next(request)
        answer.headers["content-security-policy"] = POLICY
        return answer

    @app.get("/ui/")
    def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/ui/static/plotly.min.js")
    def script() -> Any:
        if plotly is None:
            return _refused(404, "plotly is not installed")
        return FileResponse(plotly, media_type="text/javascript")

    app.mount("/ui/static", StaticFiles(directory=STATIC))

    @app.get("/ui/api/about")
    def about() -> s.About:
        return s.About(mode=mode, needs_key=key is not None, version="0")  # type: ignore[arg-type]

    _add_reading(app, runs)
    _add_acting(app, runs)
    if mode == "server":
        _add_jobs(app, runs)
    return app


def _refused(code: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "param": param, "code": None}}, code)


def _add_reading(app: FastAPI, runs: _Runs) -> None:
    @app.get("/ui/api/runs")
    def all_runs() -> s.RunList:
        return s.RunList(runs=[runs.line(run_id) for run_id in runs.ids()])

    @app.get("/ui/api/runs/{run}")
    def one(run: str) -> Any:
        if run not in runs.ids():
            return _refused(404, f"there is no run {run}")
        store = runs.store(run)
        events = [s.Event(time=e["time"], level=e["level"], message=e["message"]) for e in store.events()]
        doing = ["step 3: sampling", "  rollouts: 4 in flight"] if runs.line(run).status == "running" else []
        return s.RunView(run=runs.line(run), config=store.config(), events=events, doing=doing, problems=[])

    @app.get("/ui/api/runs/{run}/revision")
    def revision(run: str) -> s.Revision:
        return s.Revision(revision=runs.revision(run), status=runs.line(run).status)

    @app.get("/ui/api/runs/{run}/charts")
    def charts(run: str) -> s.Charts:
        return s.Charts(revision=runs.revision(run), charts=_charts(list(runs.store(run).metrics())))

    @app.get("/ui/api/runs/{run}/choices")
    def choices(run: str) -> s.Choices:
        lines = [_line(rollout) for rollout in runs.rollouts(run)]
        steps = [line.step for line in lines]
        return s.Choices(
            steps=(min(steps), max(steps)) if steps else None,
            splits=sorted({line.split for line in lines}),
            stop_reasons=sorted({line.stop_reason for line in lines}),
            tools=sorted({tool for line in lines for tool in line.tools}),
            num_rollouts=len(lines),
            indexed_share=1.0,
        )

    @app.get("/ui/api/runs/{run}/rollouts")
    def rollouts(run: str, request: Request) -> s.RolloutPage:
        return _page(runs.rollouts(run), dict(request.query_params))

    @app.get("/ui/api/runs/{run}/rollouts/{rollout}")
    def trace(run: str, rollout: str) -> Any:
        found = runs.store(run).find(rollout)
        return _trace(runs, run, found) if found else _refused(404, "there is no such rollout")

    @app.get("/ui/api/runs/{run}/rollouts/{rollout}/texts/{ref}")
    def text(run: str, rollout: str, ref: str, offset: int = 0) -> Any:
        whole = runs.texts[ref]
        return s.TextPart(text=whole[offset : offset + s.MAX_TEXT], offset=offset, num_chars=len(whole))

    @app.get("/ui/api/runs/{run}/rollouts/{rollout}/tokens")
    def tokens(run: str, rollout: str, offset: int = 0, limit: int = 2000) -> Any:
        found = runs.store(run).find(rollout)
        assert found is not None
        return _tokens(found, runs.tokenizer, offset, limit)

    @app.get("/ui/api/runs/{run}/doctor")
    def doctor(run: str) -> Any:
        return _diagnosis(run, runs.rollouts(run))


def _add_acting(app: FastAPI, runs: _Runs) -> None:
    @app.post("/ui/api/runs/{run}/grade")
    def grade(run: str, body: s.GraderTry) -> s.GraderResult:
        if "type" not in body.grader:
            return s.GraderResult(graded=[], problem="a grader has a type", field="type")
        found = runs.rollouts(run)
        chosen = [one for one in found if one.id in body.rollout_ids] or found[-body.num_rollouts :]
        graded = [s.TriedGrade(rollout=_line(one), grade=_grade("new", one.grade)) for one in chosen if one.grade]
        return s.GraderResult(graded=graded, mean_old=0.5, mean_new=0.5)

    @app.post("/ui/api/datasets/validate")
    def validate(body: s.DatasetTry) -> s.DatasetResult:
        problems, rows = [], [line for line in body.text.splitlines() if line.strip()]
        columns: Counter[str] = Counter()
        for number, line in enumerate(rows, 1):
            try:
                row = json.loads(line)
                columns.update(row.keys())
                if "messages" not in row:
                    problems.append(_problem(number, "messages", "is missing", "add messages"))
            except ValueError:
                problems.append(_problem(number, None, "is not JSON", "write one JSON object per line"))
        return s.DatasetResult(
            num_rows=len(rows),
            num_problems=len(problems),
            problems=problems[:100],
            columns=dict(columns),
            tools=[],
            example=None if problems else json.dumps(json.loads(rows[0])["messages"]),
        )

    @app.post("/ui/api/runs/{run}/{action}")
    def act(run: str, action: str) -> s.Done:
        if action == "pause":
            runs.store(run).ask_to_pause()
        runs.jobs[run] = {"pause": "paused", "cancel": "cancelled", "resume": "queued"}[action]
        return s.Done(run=runs.line(run))


def _problem(line: int, field: str | None, problem: str, cure: str) -> s.DatasetProblem:
    return s.DatasetProblem(line=line, field=field, problem=problem, cure=cure)


def _add_jobs(app: FastAPI, runs: _Runs) -> None:
    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": "m"}]}

    @app.post("/v1/files")
    async def upload(request: Request) -> Any:
        form = await request.form()
        assert form["purpose"] == "fine-tune"
        return {"id": "file-1", "filename": form["file"].filename}  # type: ignore[union-attr]

    @app.post("/v1/fine_tuning/jobs")
    async def create(request: Request) -> Any:
        body = await request.json()
        section = body["method"]["reinforcement"]
        if not isinstance(section["hyperparameters"].get("compute_multiplier", 1), int | float):
            param = "method.reinforcement.hyperparameters.compute_multiplier"
            return _refused(400, f"{param}: must be 'auto' or a number above 0 to 10.", param)
        runs.jobs["ftjob-9"] = "queued"
        return {"id": "ftjob-9", "status": "queued"}


class _Runs:
    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.texts: dict[str, str] = {}
        self.jobs: dict[str, str] = {}  # id -> status
        self._cache: dict[str, tuple[str, list[Rollout]]] = {}

    def ids(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/config.json")) + list(self.jobs)

    def store(self, run: str) -> RunStore:
        return RunStore.open(self.folder / run)

    def revision(self, run: str) -> str:
        paths = [path for path in (self.folder / run).rglob("*.json*") if path.is_file()]
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
        return hashlib.sha256(repr((facts, self.jobs.get(run))).encode()).hexdigest()[:12]

    def rollouts(self, run: str) -> list[Rollout]:
        revision = self.revision(run)
        if self._cache.get(run, ("", []))[0] != revision:
            self._cache[run] = (revision, list(self.store(run).rollouts()))
        return self._cache[run][1]

    def line(self, run: str) -> s.RunLine:
        if run in self.jobs and not (self.folder / run).exists():
            state = self.jobs[run]
            job = s.JobLine(id=run, status=state, model="m", created_at=time.time())
            able: list[s.Action] = ["pause", "cancel"] if state == "queued" else []
            return s.RunLine(id=run, name=run, kind="training", status=state, job=job, actions=able)
        store, state = self.store(run), self.store(run).read_state()
        rows = [row for row in store.metrics() if row.get("kind") == "training"]
        current = status(store)
        return s.RunLine(
            id=run,
            name=str(store.config().get("name", run)),
            kind="training",
            status=current,
            step=state.get("step"),
            steps=state.get("steps"),
            started_at=(self.folder / run / "config.json").stat().st_mtime,
            updated_at=time.time() - 30,
            split="train" if rows else None,
            grades=[row.get("train/grade") for row in rows][-60:],
            actions=["pause"] if current == "running" and not store.is_pause_asked else [],
        )

    def text(self, text: str, ref: str) -> s.Text:
        ref = hashlib.sha256(ref.encode()).hexdigest()[:12]
        self.texts[ref] = text
        return s.Text(text=text[: s.MAX_TEXT], num_chars=len(text), ref=ref)


# --- charts ---


def _charts(rows: list[dict[str, Any]]) -> list[s.Chart]:
    train = [row for row in rows if row.get("kind") == "training"]
    checks = [row for row in rows if row.get("kind") == "evaluation" and row["split"] == "validation"]

    def series(name: str, key: str, found: list[dict[str, Any]], split: Any) -> list[s.Series]:
        found = [row for row in found if row.get(key) is not None]
        half = [row.get(f"{key}_ci95") for row in found]
        if not found:
            return []
        low = [row[key] - h if h is not None else None for row, h in zip(found, half, strict=True)]
        high = [row[key] + h if h is not None else None for row, h in zip(found, half, strict=True)]
        bounds: dict[str, Any] = {"low": low, "high": high} if any(h is not None for h in half) else {}
        return [s.Series(name=name, split=split, x=[r["step"] for r in found], y=[r[key] for r in found], **bounds)]

    def both(name: str, key: str) -> list[s.Series]:
        return series(name, f"train/{key}", train, "train") + series(name, key, checks, "validation")

    def only(names: dict[str, str]) -> list[s.Series]:
        return [one for name, key in names.items() for one in series(name, key, train, None)]

    keys = sorted({key for row in train for key in row})
    parts = [key.removeprefix("train/") for key in keys if "part/" in key and not key.endswith("_ci95")]
    tools = [key for key in keys if key.startswith("train/tool_num/")]
    phases = {"sampling": "time/sampling_s", "training": "time/training_s", "sync": "time/sync_s"}
    called = only({key.rpartition("/")[2]: key for key in tools})
    given = [one for key in parts for one in both(key.removeprefix("part/"), key)]
    sampled = both("sampled", "sampled_tokens") + both("reasoning", "reasoning_tokens")
    counts = only({"no signal": "groups/no_signal", "all": "groups/total"})
    charts: list[tuple[str, str, str, str, list[s.Series]]] = [
        ("grade", "Grade", "mean grade", "Higher is better; the band is the 95% interval.", both("grade", "grade")),
        ("parts", "Grade by part", "mean grade", "What each part of the grader gives.", given),
        ("tools", "Tool calls by tool", "calls", "Calls in a step, by tool.", called),
        ("tokens", "Tokens per rollout", "tokens", "Sampled tokens of a rollout.", sampled),
        ("duration", "Seconds per rollout", "s", "From the first prompt on.", both("seconds", "duration_s")),
        ("phases", "Where a step's time goes", "s", "The phases add up to the step.", only(phases)),
        ("groups", "Groups without signal", "groups", "They teach nothing.", counts),
        ("entropy", "Entropy", "nats", "A fall to zero is a collapse.", only({"entropy": "update/entropy"})),
    ]
    return [
        s.Chart(id=i, title=t, unit=u, help=h, kind="stacked" if i == "phases" else "lines", series=found)
        for i, t, u, h, found in charts
        if found
    ]


# --- rollouts ---


def _line(rollout: Rollout) -> s.RolloutLine:
    return s.RolloutLine(
        id=rollout.id,
        step=rollout.step,
        split=rollout.split,
        item_id=rollout.item_id,
        attempt=rollout.attempt,
        grade=rollout.grade.score if rollout.grade else None,
        stop_reason=rollout.stop_reason.value,
        num_turns=len(rollout.turns),
        tools=dict(Counter(call.name for call, _ in rollout.tool_calls)),
        num_tokens=rollout.num_sampled_tokens,
        num_reasoning_tokens=sum(turn.reasoning_tokens for turn in rollout.turns),
        started_at=rollout.started_at,
        duration_s=rollout.duration_s,
        error=rollout.error,
        opening=rollout.output_text[:120],
    )


def _page(rollouts: list[Rollout], query: dict[str, str]) -> s.RolloutPage:
    lines = [(_line(rollout), rollout) for rollout in rollouts]
    tests = {
        "split": lambda v, line, r: line.split == v,
        "step": lambda v, line, r: line.step == int(v),
        "step_from": lambda v, line, r: line.step >= int(v),
        "step_to": lambda v, line, r: line.step <= int(v),
        "item": lambda v, line, r: v in line.item_id,
        "grade_min": lambda v, line, r: line.grade is not None and line.grade >= float(v),
        "grade_max": lambda v, line, r: line.grade is not None and line.grade <= float(v),
        "stop": lambda v, line, r: line.stop_reason == v,
        "tool": lambda v, line, r: v in line.tools,
        "error": lambda v, line, r: v in (line.error or ""),
        "text": lambda v, line, r: v.lower() in r.model_dump_json().lower(),
    }
    for name, value in query.items():
        if name in tests:
            lines = [(line, one) for line, one in lines if tests[name](value, line, one)]
    sort = query.get("sort", "-step")
    field = sort.removeprefix("-")
    lines.sort(key=lambda pair: pair[0].id)
    lines.sort(key=lambda pair: getattr(pair[0], field) or 0, reverse=sort.startswith("-"))
    begin, limit = int(query.get("after", 0)), int(query.get("limit", 100))
    rest = str(begin + limit) if len(lines) > begin + limit else None
    shown = [line for line, _ in lines[begin : begin + limit]]
    return s.RolloutPage(rollouts=shown, next=rest, num_matching=len(lines), indexed_share=1.0)


# --- a trace ---


def _trace(runs: _Runs, run: str, rollout: Rollout) -> s.Trace:
    group = [r for r in runs.rollouts(run) if (r.item_id, r.step, r.split) == _place(rollout)]
    ids = rollout.turns[0].input_ids if rollout.turns else []
    prompt = runs.tokenizer.decode(ids) if runs.tokenizer else f"{len(ids)} tokens"
    return s.Trace(
        rollout=_line(rollout),
        run_id=run,
        seed=rollout.seed,
        error=rollout.error,
        prompt=runs.text(prompt, f"{rollout.id}-prompt"),
        item=runs.text(
            json.dumps({"messages": [{"role": "user", "content": "question"}], "answer": "yes"}, indent=1), "i"
        ),
        environment=runs.text(json.dumps(rollout.environment), f"{rollout.id}-env") if rollout.environment else None,
        turns=[_turn(runs, rollout, index) for index in range(len(rollout.turns))],
        grade=_grade("grade", rollout.grade) if rollout.grade else None,
        group=[_line(one) for one in sorted(group, key=lambda r: r.attempt)],
    )


def _place(rollout: Rollout) -> tuple[str, int, str]:
    return rollout.item_id, rollout.step, rollout.split


def _turn(runs: _Runs, rollout: Rollout, index: int) -> s.TraceTurn:
    turn, place = rollout.turns[index], f"{rollout.id}-{index}"
    results = {result.call_id: result for result in turn.results}

    def call_of(at: int, call: ToolCall) -> s.TraceCall:
        result = results.get(call.call_id)
        return s.TraceCall(
            call_id=call.call_id,
            name=call.name,
            arguments=runs.text(call.arguments, f"{place}-{at}-arguments"),
            malformed=call.error,
            result=runs.text(result.output, f"{place}-{at}-result") if result else None,
            is_error=bool(result and result.is_error),
            started_s=turn.started_s + turn.sampled_s,
            latency_s=result.latency_s if result else 0.0,
            num_attempts=result.num_attempts if result else 1,
        )

    return s.TraceTurn(
        index=index,
        started_s=turn.started_s,
        sampled_s=turn.sampled_s,
        num_input_tokens=len(turn.input_ids),
        num_output_tokens=len(turn.output_ids),
        num_reasoning_tokens=turn.reasoning_tokens,
        finish_reason=turn.finish_reason,
        policy_version=turn.policy_version,
        is_fork=turn.is_fork,
        reasoning=runs.text(turn.message.reasoning, f"{place}-reasoning"),
        content=runs.text(turn.message.content, f"{place}-content"),
        calls=[call_of(at, call) for at, call in enumerate(turn.message.tool_calls)],
        replies=[
            s.TraceReply(role=reply.role, content=runs.text(reply.content, f"{place}-reply")) for reply in turn.replies
        ],
    )


def _grade(name: str, grade: Grade) -> s.TraceGrade:
    return s.TraceGrade(
        name=name,
        score=grade.score,
        errors=grade.errors,
        latency_s=grade.latency_s,
        is_cached=grade.is_cached,
        parts=[_grade(key, part) for key, part in grade.parts.items()],
        shadow=grade.shadow,
        shadow_errors=grade.shadow_errors,
    )


def _tokens(rollout: Rollout, tokenizer: Any, offset: int, limit: int) -> s.Tokens:
    tokens, starts = [], []
    for sequence in rollout.sequences:
        starts.append(len(tokens))
        for token, mask, logprob in zip(sequence.ids, sequence.mask, sequence.logprobs, strict=True):
            text = tokenizer.decode([token]) if tokenizer else ""
            tokens.append(s.Token(text=text, id=token, logprob=logprob if mask else None, is_trained=mask))
    problem = None if tokenizer else "the run has no tokenizer: tokens are shown by their ids"
    part = tokens[offset : offset + limit]
    return s.Tokens(tokens=part, num_tokens=len(tokens), sequence_starts=starts, advantage=0.7, problem=problem)


def _diagnosis(run: str, rollouts: list[Rollout]) -> Diagnosis:
    dead = [rollout for rollout in rollouts if rollout.stop_reason == "tool_failed"]
    finding = Finding(
        check="tool_errors",
        title="The tool search fails",
        severity="high",
        weight=len(dead) / max(1, len(rollouts)),
        evidence=f"{len(dead)} rollouts were discarded because search did not answer.",
        numbers={"discarded": len(dead), "share": len(dead) / max(1, len(rollouts))},
        rollout_ids=[rollout.id for rollout in dead[:5]],
        steps=(1, 8),
        cure="Look at environment.tools: is the server of search up?",
    )
    findings = [finding] if dead else []
    return Diagnosis(run_id=run, findings=findings, num_steps=8, checks=["tool_errors", "flat_grade"])
