"""ServerConfig: what `rft serve` is told, from configs/server.yaml plus `key=value` overrides.

`models` maps the names that clients use to what answers and what is trained. Importing this loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from rft.cluster.allocation import Allocation
from rft.config import Config, ModelConfig, RunConfig, config_problem, read_tree
from rft.errors import ConfigError

Effort = Literal["default", "low", "medium", "high"]


# What every job says itself, for looking at the rest of a run's config before there is a job.
_PLACEHOLDERS: dict[str, Any] = {
    "model": {"path": "."},
    "data": {"train": "-"},
    "grader": {"type": "string_check", "input": "", "reference": "", "operation": "eq"},
    "training": {"steps": 1},
}


def _as_run_config(value: dict[str, Any]) -> dict[str, Any]:
    """A part of a run's config, with its values as a run reads them (YAML's `1e-6` is a text). Raises ValueError."""
    sources = _PLACEHOLDERS | ({"warmup": {"demonstrations": "-"}} if "warmup" in value else {})
    tree = value | {
        key: defaults | value.get(key, {}) for key, defaults in sources.items() if key not in ("data", "grader")
    }
    try:
        parsed = RunConfig.model_validate({**_PLACEHOLDERS, **tree}).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        raise ValueError(config_problem(error)) from None
    return {key: _asked(parsed[key], asked) for key, asked in value.items()}


def _asked(parsed: Any, asked: Any) -> Any:
    """What of a parsed section was written by the user."""
    return {key: parsed[key] for key in asked} if isinstance(parsed, dict) and isinstance(asked, dict) else parsed


class LocalModel(Config):
    """A model folder: it answers, and it can be trained."""

    path: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_model_len: int = Field(2048, ge=16, description="tokens of prompt and answer together")
    kv_cache_gib: float = Field(1.0, gt=0)
    judged_by: str | None = Field(
        None, description="which model of the table answers when a grader names this one; null: this one itself"
    )
    run: dict[str, Any] = Field(
        default_factory=dict, description="a part of a run's config that every training of this model starts from"
    )

    @field_validator("run")
    @classmethod
    def _leaves_the_job_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted({"data", "environment", "grader", "judges", "name", "runs_dir", "seed"} & value.keys())
        if taken:
            raise ValueError(f"{taken[0]} comes from each job; leave it out")
        return _as_run_config(value)


class RemoteModel(Config):
    """A model behind any OpenAI-compatible URL: it answers and judges, it cannot be trained here."""

    url: str = Field(description="up to and with /v1")
    model: str | None = Field(None, description="its name there; null: the name clients use")
    api_key_env: str | None = Field(None, description="the environment variable that holds the key")
    max_concurrent: int = Field(16, ge=1)
    timeout_s: float = Field(120.0, gt=0)

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value.rstrip("/")


class AliasModel(Config):
    """Another name of a model of the table."""

    alias: str


def _kind(value: Any) -> str:
    """Which of the three an entry is, by the key that only it has."""
    keys = value if isinstance(value, dict) else vars(value)
    return "alias" if "alias" in keys else "remote" if "url" in keys else "local"


Model = LocalModel | RemoteModel
Entry = Annotated[
    Annotated[LocalModel, Tag("local")] | Annotated[RemoteModel, Tag("remote")] | Annotated[AliasModel, Tag("alias")],
    Discriminator(_kind),
]


class LimitsConfig(Config):
    """What one client may ask for."""

    max_upload_bytes: int = Field(512_000_000, ge=1)
    max_parts_bytes: int = Field(8_589_934_592, ge=1, description="of a file uploaded in parts")
    max_project_bytes: int = Field(2_500_000_000_000, ge=1, description="of all files of a project")
    uploads_per_minute: int = Field(1000, ge=1)
    max_body_bytes: int = Field(16_000_000, ge=1024, description="of any request that is not an upload")
    min_training_rows: int = Field(10, ge=1)
    max_training_rows: int = Field(50_000, ge=1)
    max_validation_rows: int = Field(1000, ge=1)
    max_queued_jobs: int = Field(1000, ge=1, description="per project; not yet running")


class OutgoingConfig(Config):
    """Which hosts the URLs of tools, endpoint graders and webhooks may name."""

    allow: list[str] | None = Field(
        None, description="host names, *.host.name, addresses, networks (10.0.0.0/8); null: all that is not denied"
    )
    deny: list[str] = Field(
        default=["169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32", "metadata.google.internal"],
        description="link-local and metadata addresses; also those that a name resolves to",
    )


class WorkerConfig(Config):
    """How jobs run: as processes of this machine."""

    type: Literal["local", "slurm"] = "local"
    max_running: int = Field(1, ge=1, description="jobs at once")
    launch: list[str] = Field(
        default_factory=list,
        description="what comes before `-m rft train`, e.g. [accelerate, launch, --config_file, F]; empty: accelerate"
        " launch with one process",
    )
    max_restarts: int = Field(3, ge=0, description="of a job whose process crashed, each from its last checkpoint")
    heartbeat_timeout_s: float = Field(1800.0, gt=0, description="without any sign of life the process is ended")
    stop_timeout_s: float = Field(120.0, gt=0, description="what a process may take to end when asked")
    budget_s: float | None = Field(None, gt=0, description="of running, per job; beyond it the job is paused")


class SlurmWorkerConfig(WorkerConfig, Allocation):
    """Jobs run as jobs of Slurm, each submitted with these nodes; `launch` is not used."""

    type: Literal["slurm"]

    def options(self, *, is_warmup: bool) -> list[str]:
        """Of `rft submit`; a warm-up gets one device."""
        given = self.model_dump(mode="json", include=set(Allocation.model_fields), exclude_none=True)
        if is_warmup:
            given |= {"nodes": 1, "engine_nodes": 0, "gpus_per_node": min(1, self.gpus_per_node)}
        further = given.pop("slurm")
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        flags += [f"--slurm={key}={value}" for key, value in further.items()]
        return [*flags, *(["--warmup"] if is_warmup else [])]


def _worker_kind(value: Any) -> str:
    return str(value.get("type", "local") if isinstance(value, dict) else value.type)


WorkerUnion = Annotated[
    Annotated[WorkerConfig, Tag("local")] | Annotated[SlurmWorkerConfig, Tag("slurm")], Discriminator(_worker_kind)
]


class InferenceConfig(Config):
    """How models answer."""

    engine: Literal["vllm", "transformers"] = "vllm"
    max_loaded: int = Field(2, ge=1, description="local models in memory at once; the longest unused one makes room")
    idle_stop_s: float = Field(300.0, gt=0, description="without a request a model is unloaded")
    start_timeout_s: float = Field(300.0, gt=0)
    request_timeout_s: float = Field(600.0, gt=0)
    adapters: Literal["auto", "merged", "beside"] = Field(
        "auto",
        description="tuned models with adapters: merged into a copy of their own, or beside their base in one engine"
        " (vLLM's adapters are ten times slower on a CPU); auto: beside on a GPU",
    )
    keep_responses_days: int = Field(30, ge=1, description="of responses with store: true")


class WebhookConfig(Config):
    """Who is told when a job ends; signed as the SDK verifies it."""

    url: str
    secret_env: str = Field(description="the environment variable that holds the signing secret (whsec_...)")
    project: str | None = Field(None, description="null: of all projects")


class ServerConfig(Config):
    """One server, complete."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 lets the system choose")
    data_dir: Path = Field(Path("server"), description="files, runs, models, keys: all the server knows")
    organization: str = Field("rft", pattern=r"^[a-z0-9-]{1,64}$", description="in the names of tuned models")
    models: dict[str, Entry]
    limits: LimitsConfig = LimitsConfig()
    outgoing: OutgoingConfig = OutgoingConfig()
    worker: WorkerUnion = WorkerConfig()
    inference: InferenceConfig = InferenceConfig()
    webhooks: list[WebhookConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> ServerConfig:
        for name in self.models:
            if not name or ":" in name:
                raise ValueError(f"models: {name!r}: names are not empty and have no colon")
            found = self.model(name)
            if isinstance(found, LocalModel) and found.judged_by not in (None, *self.models):
                raise ValueError(f"models: {name}.judged_by: there is no model {found.judged_by}")
        return self

    def model(self, name: str) -> Model | None:
        """What a name stands for, through its aliases; None for an unknown name. Raises ValueError for a broken one."""
        seen: list[str] = []
        while isinstance(found := self.models.get(name), AliasModel):
            seen.append(name)
            name = found.alias
            if name in seen or name not in self.models:
                raise ValueError(
                    f"models: {seen[0]} leads to {name}, which is {'a circle' if name in seen else 'not there'}"
                )
        return found


def load_server_config(path: Path, overrides: list[str] | None = None) -> ServerConfig:
    """Raises ConfigError naming the field."""
    tree = read_tree(path, overrides, example="configs/server.yaml")
    try:
        return ServerConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            config_problem(error, tags=("local", "remote", "alias", "slurm")),
            where=str(path),
            cure="compare with configs/server.yaml; rft/server/settings.py lists every key",
        ) from None


def engine_model(model: LocalModel) -> ModelConfig:
    """The model as runs and engines name it."""
    return ModelConfig.model_validate({"path": model.path, "dtype": model.dtype})
