"""From a request to what runs: a complete RunConfig, in the job's run folder as `job_config.yaml` (mode 0600).

That file is the one place that holds a job's secrets. It starts from the model's `run` in the server's config; the job
decides data, tools, grader, seed and hyperparameters. What depends on the number of rows is provisional until
`schedule` has it. Reads no dataset, loads no model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rft.config import RunConfig, TrainingConfig, validate_config
from rft.errors import ConfigError
from rft.files import replace
from rft.server.errors import ApiError
from rft.server.grading.judging import remote_judge
from rft.server.jobs.automatic import items_per_step, num_steps, resolved
from rft.server.jobs.bodies import IntegrationBody, JobBody
from rft.server.jobs.method import Method, revealed, wire_form
from rft.server.models import Target
from rft.server.settings import LocalModel, RemoteModel

if TYPE_CHECKING:
    from rft.server.services import Services

# A grader's source may have 256 kB: libyaml, where it is there, takes 10 ms for what takes Python a second.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
JOB_CONFIG = "job_config.yaml"
TRAIN, VALIDATION = "data/train.jsonl", "data/validation.jsonl"  # in the run folder
_EFFORTS = {"low": 0.5, "default": 1.0, "medium": 1.0, "high": 2.0}
_NUM_BEST = 3
_TRUNCATED_GRADE = -1.0
_ROLLOUT_TOKENS = 512
_WARMUP_RATES = {True: 2e-4, False: 2e-5}  # with adapters; of all weights
_NO_GRADER = {"type": "string_check", "name": "none", "input": "", "reference": "", "operation": "eq"}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request whose every part has been looked at."""

    body: JobBody
    method: Method
    target: Target
    project: str
    seed: int


def write_run_config(services: Services, job_id: str, request: JobRequest) -> Path:
    """The job's config, complete and valid, its row counts provisional. Raises ApiError (400), StorageError."""
    tree = run_tree(services, job_id, request)
    return _write(services.jobs.folder(job_id) / JOB_CONFIG, tree)


def schedule(path: Path, hyperparameters: dict[str, Any], num_rows: int) -> None:
    """Put what follows from the number of rows into a job's config; hyperparameters: none of them auto."""
    tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    _write(path, merged(tree, _schedule(hyperparameters, num_rows)))


def run_tree(services: Services, job_id: str, request: JobRequest) -> dict[str, Any]:
    """The config as plain data, with secrets. Raises ApiError (400) where it cannot be a run."""
    model = request.target.local
    check_folder(model, "model")
    start = {"engine": _engine(model), "rollout": {"truncated_grade": _TRUNCATED_GRADE}}
    start["training"] = {"keep_best": _NUM_BEST}
    common = _common(services, job_id, request, model)
    if request.method.reinforcement is not None:
        run = {key: value for key, value in model.run.items() if key != "warmup"}
        job = _reinforcement(services, request, model)
    else:
        run, job = dict(model.run), _supervised(common["data"]["train"])
    tree = merged(start, run, common, job, _provisional(services, request))
    # the grader is known to be good, and parsing a long source once more takes a tenth of a second
    checked = tree | ({"grader": request.method.grader} if request.method.grader is not None else {})
    try:
        validate_config(checked, where="the job")
    except ConfigError as error:
        raise ApiError(f"The job cannot be run: {error.problem}", code="invalid_run_config") from None
    return tree


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Mappings joined key by key; anything else is replaced by what comes later."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def check_folder(model: LocalModel, param: str) -> None:
    """Raises ApiError (400) when the model's folder is not there."""
    if not (model.path / "config.json").is_file():
        message = "The folder of this model is missing on the server; ask its administrator to check the models table."
        raise ApiError(message, code="model_not_available", param=param)


# --- the parts of a config ---


def _engine(model: LocalModel) -> dict[str, Any]:
    kind = model.run.get("engine", {}).get("type", "vllm")
    cache = {"kv_cache_gib": model.kv_cache_gib} if kind == "vllm" else {}
    return {"type": kind, "max_model_len": model.max_model_len, **cache}


def _common(services: Services, job_id: str, request: JobRequest, model: LocalModel) -> dict[str, Any]:
    folder = services.jobs.folder(job_id).resolve()
    data = {"train": str(folder / TRAIN)}
    if request.body.validation_file is not None:
        data["validation"] = str(folder / VALIDATION)
    policy: dict[str, Any] = {"path": str(model.path.resolve()), "dtype": model.dtype}
    if request.target.checkpoint is not None:
        policy["init_from"] = str(request.target.checkpoint.resolve())
    tree = {"name": job_id, "seed": request.seed, "runs_dir": str(services.jobs.runs.resolve())}
    # the run's config knows trackers only where that part of rft is installed
    trackers = _trackers(request.body, job_id) if "trackers" in RunConfig.model_fields else []
    return tree | {"model": policy, "data": data} | ({"trackers": trackers} if trackers else {})


def _reinforcement(services: Services, request: JobRequest, model: LocalModel) -> dict[str, Any]:
    method, given = request.method, request.method.reinforcement
    assert given is not None, "this is the config of a reinforcement job"
    tree: dict[str, Any] = {
        "grader": revealed(method.grader.model_dump(mode="python", exclude_unset=True)),
        "judges": _judges(services, request),
        "rollout": {"max_tokens_per_turn": _turn_tokens(model, given.hyperparameters.reasoning_effort)},
    }
    if method.tools:
        tools = [revealed(tool.model_dump(mode="python", exclude_defaults=True)) for tool in method.tools]
        tree["environment"] = {"type": "http", "tools": tools}
    if given.max_episode_steps is not None:  # it is the limit that ends an episode: turns are steps too
        steps = given.max_episode_steps
        tree["rollout"] |= {"max_episode_steps": steps, "max_turns": steps}
    if given.response_format is not None:
        tree["rollout"]["response_format"] = given.response_format.model_dump(exclude_none=True)
    return tree


def _supervised(demonstrations: str) -> dict[str, Any]:
    return {"grader": _NO_GRADER, "training": {"steps": 0}, "warmup": {"demonstrations": demonstrations}}


def _turn_tokens(model: LocalModel, effort: str) -> int:
    """low, medium, high: half, once, twice the model's own limit; never more than half of the context for it."""
    room = _context(model)
    own = model.run.get("rollout", {}).get("max_tokens_per_turn", min(_ROLLOUT_TOKENS, room // 2))
    return int(min(max(1, round(own * _EFFORTS[effort])), max(own, room // 2)))


def _context(model: LocalModel) -> int:
    return int(model.run.get("engine", {}).get("max_model_len", model.max_model_len))


def _judges(services: Services, request: JobRequest) -> dict[str, Any]:
    """Where the models that the grader asks are. Raises ApiError naming the grader's field."""
    return {name: _judge(services, name, param, request.project) for param, name in request.method.judges}


def _judge(services: Services, name: str, param: str, project: str) -> dict[str, Any]:
    try:
        target = services.models.judge(name, project)
    except ApiError as error:
        raise ApiError(error.message, code="model_not_found", param=param) from None
    base = target.base
    if isinstance(base, RemoteModel):
        return remote_judge(base, target.name).model_dump(mode="json", exclude_defaults=True)
    if target.checkpoint is not None:
        message = f"The tuned model {name} cannot grade a job; name a model of the server's table."
        raise ApiError(message, code="model_not_available", param=param)
    check_folder(base, param)
    judge = {"path": str(base.path.resolve()), "dtype": base.dtype}
    return judge | {"max_model_len": base.max_model_len, "kv_cache_gib": base.kv_cache_gib}


def _trackers(body: JobBody, job_id: str) -> list[dict[str, Any]]:
    """The integrations, as a run's trackers."""
    return [_tracker(integration, body.model, job_id) for integration in body.integrations or []]


def _tracker(integration: IntegrationBody, model: str, job_id: str) -> dict[str, Any]:
    given = integration.wandb
    tags = [*given.tags, "openai/finetune", f"openai/{model}", f"openai/{job_id}"]
    tracker = {"type": "wandb", "project": given.project, "name": given.name or job_id, "tags": tags}
    return tracker | ({"entity": given.entity} if given.entity else {})


# --- numbers ---


def _provisional(services: Services, request: JobRequest) -> dict[str, Any]:
    """The schedule of a file with as few rows as are allowed, and the numbers that no row changes."""
    method, run = request.method, request.target.local.run
    section = wire_form(method)[method.body.type]["hyperparameters"]
    num_rows = services.config.limits.min_training_rows
    numbers = resolved(section, num_rows, is_supervised=method.reinforcement is None)
    multiplier = numbers["learning_rate_multiplier"]
    if method.reinforcement is None:
        has_adapter = run.get("model", {}).get("lora", True) is not None
        rate = run.get("warmup", {}).get("learning_rate") or _WARMUP_RATES[has_adapter]
        fixed: dict[str, Any] = {"warmup": {"learning_rate": rate * multiplier}}
    else:
        rate = run.get("training", {}).get("learning_rate", TrainingConfig.model_fields["learning_rate"].default)
        training = {"learning_rate": rate * multiplier, "compute_multiplier": numbers["compute_multiplier"]}
        fixed = {"training": training, "evaluation": {"rollouts_per_item": numbers["eval_samples"]}}
    return merged(fixed, _schedule(numbers, num_rows))


def _schedule(numbers: dict[str, Any], num_rows: int) -> dict[str, Any]:
    epochs, batch = numbers["n_epochs"], numbers["batch_size"]
    if "eval_interval" not in numbers:
        return {"warmup": {"epochs": epochs, "batch_size": batch}}
    return {
        "training": {"steps": num_steps(num_rows, epochs, batch), "items_per_step": items_per_step(num_rows, batch)},
        # a step that is evaluated is also a checkpoint, whatever training.checkpoint_every says
        "evaluation": {"every": numbers["eval_interval"]},
    }


def _write(path: Path, tree: dict[str, Any]) -> Path:
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return replace(path, text.encode(), mode=0o600)
